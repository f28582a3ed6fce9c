"""Images out of files: a table of grey pixels, or a folder a class of images in any format that Pillow reads.

Letters: N images, C channels (1: all are grey; else 3), S their side.
"""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torch import Tensor

from lora_exp.config import DataConfig
from lora_exp.data.broken import BadRecords
from lora_exp.data.class_folders import ordered_classes
from lora_exp.errors import UserError, is_bug
from lora_exp.inputs import class_folders, files_of

PIXELS = "images.safetensors"
FACTS = "facts.json"


def convert_table(file: Path, size: int, folder: Path) -> None:
    """A .csv or .csv.gz of grey pixels and a label a line → ``folder`` with ``PIXELS`` and ``FACTS``."""
    pixels, labels = _read(file)
    side = math.isqrt(pixels.shape[1])
    images = resized(torch.from_numpy(pixels).view(-1, 1, side, side), size)
    names = [str(label) for label in range(int(labels.max()) + 1)]
    _write(images, torch.from_numpy(labels), names, [], folder)


def convert_folders(root: Path, section: DataConfig, size: int, folder: Path) -> None:
    """A folder a class → the same. Raises UserError if more files than ``data.max_bad_fraction`` are no images."""
    bad, images, labels = BadRecords(section.max_bad_fraction), [], []
    classes = class_folders(root)
    names = ordered_classes({each.name for each in classes})
    for each in classes:
        for file in files_of(each):
            bad.seen += 1
            image = read_image(file, size)
            if isinstance(image, str):
                bad.add(str(file), image)
            else:
                images.append(image)
                labels.append(names.index(each.name))
    bad.check()
    is_grey = all(len(image) == 1 for image in images)
    pixels = torch.stack([image if is_grey else image.expand(3, -1, -1) for image in images])
    _write(pixels, torch.tensor(labels), list(names), bad.said(), folder)


def read_image(file: Path, size: int) -> Tensor | str:
    """Pixels uint8 (1 or 3, S, S), turned as the camera was and the middle square of it; or why it is no image."""
    try:
        with Image.open(file) as opened:
            image = _upright(opened)
            pixels = np.asarray(image)
    except Exception as error:  # Pillow raises errors of many classes for files that are damaged
        if is_bug(error) or isinstance(error, MemoryError):
            raise
        return f"it is no image that can be read ({' '.join(str(error).split())[:200] or type(error).__name__})"
    channels = torch.from_numpy(pixels.copy())
    channels = channels[None] if channels.dim() == 2 else channels.permute(2, 0, 1)
    return resized(_square(channels)[None], size)[0]


def resized(images: Tensor, size: int) -> Tensor:
    """Images uint8 (N, C, any, any) at side ``size``."""
    found = F.interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return found.round().clamp(0, 255).to(torch.uint8)


def _upright(image: Image.Image) -> Image.Image:
    """Grey or RGB, 8 bits a channel. What is transparent stands on white."""
    turned = ImageOps.exif_transpose(image)
    if turned.mode.startswith("I"):  # 16 bits, which Pillow would cut off and not scale
        return Image.fromarray((np.asarray(turned).clip(0, 65535) // 257).astype(np.uint8))
    if turned.mode in ("1", "L"):
        return turned.convert("L")
    if not turned.has_transparency_data:
        return turned.convert("RGB")
    white = Image.new("RGBA", turned.size, "white")
    return Image.alpha_composite(white, turned.convert("RGBA")).convert("RGB")


def _square(image: Tensor) -> Tensor:
    """The middle of (C, height, width): as much as is square."""
    height, width = image.shape[1:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return image[:, top : top + side, left : left + side]


def _write(pixels: Tensor, labels: Tensor, names: list[str], said: list[str], folder: Path) -> None:
    save_file({"pixels": pixels.contiguous(), "labels": labels}, folder / PIXELS)
    (folder / FACTS).write_text(json.dumps({"class_names": names, "said": said}) + "\n", encoding="utf-8")


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
