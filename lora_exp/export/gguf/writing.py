"""Writing a GGUF: fields first, then one weight after the other, so that one at a time is in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from torch import Tensor

from lora_exp.export.gguf.quantising import encode, shape_in_bytes

_VERSION = 2  # of the quantised formats


@dataclass(frozen=True)
class Piece:
    """One tensor of a file. ``make`` returns its values, of ``shape``, in torch's order of dimensions."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    make: Callable[[], Tensor]

    @property
    def bytes_shape(self) -> tuple[int, ...]:
        return shape_in_bytes(self.shape, self.type)

    @property
    def numpy_type(self) -> np.dtype[np.generic]:
        plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}
        return np.dtype(plain.get(self.type, np.uint8))

    @property
    def n_bytes(self) -> int:
        return int(np.prod(self.bytes_shape)) * self.numpy_type.itemsize


def write(
    path: Path,
    architecture: str,
    describe: Callable[[GGUFWriter], None],
    pieces: Sequence[Piece],
    say: Callable[[float], object] = lambda share: None,
) -> None:
    """``describe`` adds the fields; ``say`` hears what share of the bytes is written."""
    writer = GGUFWriter(path, architecture)
    try:
        describe(writer)
        writer.add_quantization_version(_VERSION)
        for piece in pieces:
            writer.add_tensor_info(piece.name, piece.bytes_shape, piece.numpy_type, piece.n_bytes, piece.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_values(writer, pieces, say)
    finally:
        writer.close()


def _write_values(writer: GGUFWriter, pieces: Sequence[Piece], say: Callable[[float], object]) -> None:
    whole, done = sum(piece.n_bytes for piece in pieces), 0
    for piece in pieces:
        values = piece.make().detach().float().cpu().contiguous().numpy()
        writer.write_tensor_data(encode(values, piece.type, piece.name))
        done += piece.n_bytes
        say(done / whole)
