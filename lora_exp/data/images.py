"""Labelled images: a table of grey pixels, split by class, at the side the model is to see.

Letters: N images, B of a batch, S their side (``data.image_size``).
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_exp.data.kind import Data
from lora_exp.data.split import held_out_by_class
from lora_exp.errors import UserError
from lora_exp.inputs import image_path_problem
from lora_exp.machine.cache import cache_folder, file_sha256, made_once
from lora_exp.machine.packaged import find_packaged, install_line
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import RowLosses

if TYPE_CHECKING:
    from lora_exp.data.kinds.images import Images

# Raised when rows made by an older version of this file would differ.
_FORMAT = 1


@dataclass(frozen=True)
class Table(Dataset[dict[str, Tensor]]):
    """``pixels`` uint8 (N, 1, S, S) and ``labels`` int64 (N,); a row has both of one image."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[index], "labels": self.labels[index]}


def load_table(section: Images) -> Data:
    """Read, resize and split the images, or take them from the cache.

    Of each class its share is held out; ``train_images`` of the others are trained on, spread evenly over them.
    Raises UserError for a file that is missing or no such table, or one image alone.
    """
    file = _find_file(section)
    key = f"{file_sha256(file)[:20]}-{file.suffix.lstrip('.')}-{section.image_size}-{_FORMAT}"
    folder = cache_folder("datasets", section.label, key, section.cache_dir)
    made_once(folder, lambda temporary: _convert(file, section.image_size, temporary))
    table = load_file(folder / "images.safetensors")
    train, validation = split(table["labels"], section)
    classes = int(table["labels"].max()) + 1
    return Data(
        train=Table(table["pixels"][train], table["labels"][train]),
        validation=Table(table["pixels"][validation], table["labels"][validation]),
        rows=f"images of {section.image_size}×{section.image_size} pixels in {classes} classes",
        shape={"classes": classes, "image_size": section.image_size},
    )


def split(labels: Tensor, section: Images) -> tuple[Tensor, Tensor]:
    """Indices (N_train,) and (N_validation,) into ``labels`` (N,), each class in its share."""
    if len(labels) < 2:
        raise UserError(f"data={section.label} has {len(labels)} images, of which none can be held out: give more")
    train, validation = map(torch.tensor, held_out_by_class(labels.tolist(), section.val_fraction))
    most = min(section.train_images or len(train), len(train))
    return train[torch.arange(most) * len(train) // max(most, 1)], validation


def image_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> RowLosses:
    """Cross-entropy of ``pixels`` (B, 3, S, S) against classes ``labels`` (B,), in float32; one prediction an image."""
    return class_losses(model(batch["pixels"]), batch["labels"])


def collate_images(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images of C = 1 or 3 channels, uint8 (C, S, S) → ``pixels`` (B, 3, S, S) in [0, 1] and ``labels`` (B,)."""
    pixels = torch.stack([row["pixels"] for row in rows]).expand(-1, 3, -1, -1)
    return {"pixels": pixels.float() / 255, "labels": torch.stack([row["labels"] for row in rows]).long()}


def _find_file(section: Images) -> Path:
    if section.path:
        if problem := image_path_problem(section.path):
            raise UserError(problem)
        return Path(section.path).expanduser()
    assert section.packaged is not None
    packaged = find_packaged(section.packaged)
    if packaged is None:
        raise UserError(
            f"data={section.label} is not installed: {install_line(section.packaged)}, or take your own "
            "by data.path=FILE, a .csv or .csv.gz whose lines are an image's pixels (0 to 255) and its label"
        )
    return packaged


def _convert(file: Path, size: int, folder: Path) -> None:
    pixels, labels = _read(file)
    side = math.isqrt(pixels.shape[1])
    images = torch.from_numpy(pixels).view(-1, 1, side, side)
    resized = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    table = {"pixels": resized.round().clamp(0, 255).to(torch.uint8), "labels": torch.from_numpy(labels)}
    save_file(table, folder / "images.safetensors")


def _read(file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, side²) and labels int64 (N,)."""
    raw = file.read_bytes()
    lines = (gzip.decompress(raw) if file.suffix == ".gz" else raw).split()
    width = lines[0].count(b",") + 1 if lines else 0
    try:
        table = np.array(b",".join(lines).split(b","), dtype=np.int64).reshape(-1, width)
    except ValueError as error:
        raise UserError(f"{file} is not a table of whole numbers ({error}): give pixels and a label a line") from None
    pixels, labels = table[:, :-1], table[:, -1]
    if math.isqrt(width - 1) ** 2 != width - 1 or pixels.min() < 0 or pixels.max() > 255 or labels.min() < 0:
        raise UserError(
            f"{file} has lines of {width} numbers: give the pixels of a square grey image, 0 to 255, and a label from 0"
        )
    return pixels.astype(np.uint8), labels.copy()
