"""The number formats of a GGUF's weights, and which weight gets which of them.

``q4_k_m`` is a mixture: the choice by layer is that of llama.cpp's ``llama-quantize`` (``src/llama-quant.cpp``), and
its blocks are computed by llama.cpp itself, out of the ``xllamacpp`` package.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType, quants
from numpy.typing import NDArray

from lora_exp.errors import UserError
from lora_exp.export.gguf.packages import xllamacpp

Type = GGMLQuantizationType
Values = NDArray[np.float32]
FILE_TYPES = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q4_k_m": LlamaFileType.MOSTLY_Q4_K_M,
}
_PLAIN = {"f32": Type.F32, "f16": Type.F16, "bf16": Type.BF16, "q8_0": Type.Q8_0}
_BITS = {"f32": 32.0, "f16": 16.0, "bf16": 16.0, "q8_0": 8.5, "q4_k_m": 5.5}  # a weight, about
# What takes a format's place where its blocks do not divide a row.
_INSTEAD = {Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}
_BY_NUMPY = (Type.F32, Type.F16, Type.BF16, Type.Q8_0)
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Mixture:
    """What the choice depends on beside a tensor's name and shape. ``tied``: the embedding is the output head too.

    ``wide_values``: a Llama of 80 layers with shared keys and values, the 70B.
    """

    kind: str
    layers: int
    tied: bool
    wide_values: bool = False

    def type_of(self, name: str, shape: Sequence[int]) -> Type:
        """The format of a tensor: vectors and what norms have stay float32."""
        if len(shape) < 2 or not name.endswith(".weight") or name.endswith("_norm.weight"):
            return Type.F32
        wanted = _PLAIN[self.kind] if self.kind in _PLAIN else self._mixed(name, shape[-1])
        return _that_fits(wanted, shape[-1])

    def _mixed(self, name: str, columns: int) -> Type:
        if name == "output.weight" or (self.tied and name == "token_embd.weight"):
            return Type.Q6_K if columns % GGML_QUANT_SIZES[Type.Q4_K][0] == 0 else Type.Q8_0
        found = _LAYER.fullmatch(name)
        if found is None or found[2] not in ("attn_v", "ffn_down"):
            return Type.Q4_K
        if _gets_more_bits(int(found[1]), self.layers):
            return Type.Q6_K
        return Type.Q5_K if self.wide_values and found[2] == "attn_v" else Type.Q4_K


def bytes_of(kind: str, weights: int) -> int:
    """About how much room so many weights take."""
    return int(weights * _BITS[kind] / 8)


def shape_in_bytes(shape: Sequence[int], type: Type) -> tuple[int, ...]:
    """The shape of what ``encode`` returns."""
    if type in (Type.F32, Type.F16):
        return tuple(shape)
    return quants.quant_shape_to_byte_shape(shape, type)


def encode(values: Values, type: Type, name: str = "a weight") -> NDArray[np.generic]:
    """Float32 values in a number format: float32, float16, or the bytes of its blocks, row by row.

    Raises UserError for values that the format cannot hold.
    """
    if not np.isfinite(values).all():
        raise UserError(f"{name} has values that are not finite: check the run for one that diverged")
    if type is Type.F16 and (largest := float(np.abs(values).max(initial=0))) > float(np.finfo(np.float16).max):
        raise UserError(f"{name} has a value of {largest:.3g}, above what float16 holds: choose export.type=bf16")
    if type in _BY_NUMPY:
        return quants.quantize(values, type)
    return _by_llama_cpp(values, type)


def _that_fits(wanted: Type, columns: int) -> Type:
    if columns % GGML_QUANT_SIZES[wanted][0] and wanted in _INSTEAD:
        wanted = _INSTEAD[wanted]
    return wanted if columns % GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16


def _gets_more_bits(layer: int, layers: int) -> bool:
    """The first and the last eighth, and each third between them."""
    first = layers // 8
    return layer < first or layer >= 7 * layers // 8 or (layer - first) % 3 == 2


def _by_llama_cpp(values: Values, type: Type) -> NDArray[np.uint8]:
    rows, columns = values.size // values.shape[-1], values.shape[-1]
    source = np.ascontiguousarray(values, np.float32)
    found = np.empty(shape_in_bytes(values.shape, type), np.uint8)
    as_floats = source.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    written = _quantiser()(int(type), as_floats, found.ctypes.data_as(ctypes.c_void_p), 0, rows, columns, None)
    assert written == found.nbytes
    return found


@functools.cache
def _quantiser() -> ctypes._NamedFuncPointer:
    """``ggml_quantize_chunk(type, source, target, first, rows, columns, importance)``, of ``ggml.h``: bytes written."""
    library = ctypes.CDLL(xllamacpp("export.type=q4_k_m").xllamacpp.__file__)
    try:
        found = library.ggml_quantize_chunk
    except AttributeError as error:
        raise UserError(
            "the xllamacpp package of this system hides llama.cpp's quantiser: choose export.type=q8_0, or run "
            "llama.cpp's llama-quantize on an export of export.type=f16"
        ) from error
    floats = ctypes.POINTER(ctypes.c_float)
    found.argtypes = [ctypes.c_int, floats, ctypes.c_void_p, *[ctypes.c_int64] * 3, floats]
    found.restype = ctypes.c_size_t
    return found
