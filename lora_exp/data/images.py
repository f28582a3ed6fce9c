"""Labelled images: read once, split by class, at the side the model is to see.

Letters: N images, B of a batch, C = 1 or 3 channels, S their side (``data.image_size``).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_exp.data.class_folders import ordered_classes
from lora_exp.data.image_files import FACTS, PIXELS, convert_folders, convert_table
from lora_exp.data.kind import Data
from lora_exp.data.split import SPLITS, held_out_by_class
from lora_exp.errors import UserError
from lora_exp.inputs import image_path_problem
from lora_exp.machine.cache import cache_folder, file_sha256, folder_sha256, made_once
from lora_exp.machine.packaged import find_packaged, install_line
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import RowLosses

if TYPE_CHECKING:
    from lora_exp.data.kinds.images import Images

# Raised when rows made by an older version of this file would differ.
_FORMAT = 2


@dataclass(frozen=True)
class Table(Dataset[dict[str, Tensor]]):
    """``pixels`` uint8 (N, C, S, S) and ``labels`` int64 (N,); a row has both of one image."""

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixels": self.pixels[index], "labels": self.labels[index]}

    def of(self, indices: Tensor) -> Table:
        return Table(self.pixels[indices], self.labels[indices])


@dataclass(frozen=True)
class _Images:
    """One source: its table, its classes' names, what a person must hear of it, and its key in the cache."""

    table: Table
    names: Sequence[str]
    said: list[str]
    key: str


def load_table(section: Images) -> Data:
    """Read, resize and split the images, or take them from the cache.

    Of each class its share is held out; ``train_images`` of the others are trained on, spread evenly over them.
    Raises UserError for a file that is missing or no such table, files that are no images, or one image alone.
    """
    paths = {"train": _find(section, section.path), "validation": section.validation_path, "test": section.test_path}
    found = {split: _images(section, _find(section, path)) for split, path in paths.items() if path}
    names = ordered_classes({name for images in found.values() for name in images.names})
    tables = _split(section, {split: _renumbered(images, names) for split, images in found.items()})
    return Data(
        train=tables["train"],
        validation=tables["validation"],
        rows=f"images of {section.image_size}×{section.image_size} pixels in {len(names)} classes",
        shape={"classes": len(names), "image_size": section.image_size},
        test=tables.get("test"),
        fingerprint=_fingerprint(section, found),
        said=[line for images in found.values() for line in images.said],
    )


def split(labels: Tensor, section: Images) -> tuple[Tensor, Tensor]:
    """Indices (N_train,) and (N_validation,) into ``labels`` (N,), each class in its share."""
    return _held_out(labels, section.val_fraction, section)


def image_losses(model: nn.Module, batch: Mapping[str, Tensor]) -> RowLosses:
    """Cross-entropy of ``pixels`` (B, 3, S, S) against classes ``labels`` (B,), in float32; one prediction an image."""
    return class_losses(model(batch["pixels"]), batch["labels"])


def collate_images(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images uint8 (C, S, S) → ``pixels`` (B, 3, S, S) in [0, 1] and ``labels`` (B,)."""
    pixels = torch.stack([row["pixels"] for row in rows]).expand(-1, 3, -1, -1)
    return {"pixels": pixels.float() / 255, "labels": torch.stack([row["labels"] for row in rows]).long()}


def _find(section: Images, path: str | None) -> Path:
    if path:
        if problem := image_path_problem(path):
            raise UserError(problem)
        return Path(path).expanduser()
    assert section.packaged is not None
    packaged = find_packaged(section.packaged)
    if packaged is None:
        raise UserError(
            f"data={section.label} is not installed: {install_line(section.packaged)}, or take your own by "
            "data.path=PATH: a folder with a folder of images a class, or a .csv or .csv.gz whose lines are a grey "
            "image's pixels (0 to 255) and its label"
        )
    return packaged


def _images(section: Images, path: Path) -> _Images:
    """What lies at ``path``, read once and kept in the cache."""
    digest = folder_sha256(path) if path.is_dir() else file_sha256(path)
    kind = f"folders-{section.max_bad_fraction:g}" if path.is_dir() else path.suffix.lstrip(".")
    key = f"{digest[:20]}-{kind}-{section.image_size}-{_FORMAT}"
    folder = cache_folder("datasets", section.label, key, section.cache_dir)

    def convert(temporary: Path) -> None:
        if path.is_dir():
            convert_folders(path, section, section.image_size, temporary)
        else:
            convert_table(path, section.image_size, temporary)

    made_once(folder, convert)
    table, facts = load_file(folder / PIXELS), json.loads((folder / FACTS).read_text(encoding="utf-8"))
    return _Images(Table(table["pixels"], table["labels"]), facts["class_names"], facts["said"], key)


def _renumbered(images: _Images, names: Sequence[str]) -> Table:
    """Its labels as numbers among the classes of all sources."""
    places = torch.tensor([names.index(name) for name in images.names])
    return Table(images.table.pixels, places[images.table.labels])


def _split(section: Images, found: Mapping[str, Table]) -> dict[str, Table]:
    """Each split's table: its own, or a share of the training's."""
    tables = dict(found)
    for name in SPLITS[1:]:
        fraction = section.val_fraction if name == "validation" else section.test_fraction
        if name not in found and fraction:
            whole = len(found["train"])
            rest, held = _held_out(tables["train"].labels, fraction * whole / len(tables["train"]), section)
            tables |= {name: tables["train"].of(held), "train": tables["train"].of(rest)}
    train = tables["train"]
    most = min(section.train_images or len(train), len(train))
    return {**tables, "train": train.of(torch.arange(most) * len(train) // max(most, 1))}


def _held_out(labels: Tensor, fraction: float, section: Images) -> tuple[Tensor, Tensor]:
    if len(labels) < 2:
        raise UserError(f"data={section.label} has {len(labels)} images, of which none can be held out: give more")
    rest, held = held_out_by_class(labels.tolist(), fraction)
    return torch.tensor(rest), torch.tensor(held)


def _fingerprint(section: Images, found: Mapping[str, _Images]) -> str:
    values = [section.val_fraction, section.test_fraction, section.train_images]
    keys = {split: images.key for split, images in found.items()}
    return hashlib.sha256(json.dumps([keys, values]).encode()).hexdigest()[:20]
