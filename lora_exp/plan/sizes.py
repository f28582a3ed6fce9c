"""Bytes of what stays for a whole run: base weights as they are stored, optimizer states, the adapter's file."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from lora_exp.config import OptimizerConfig, QuantizationConfig

_SECOND_BLOCK = 256  # constants that share a constant in double quantisation (QLoRA, section 3)
_TABLE = 16 * 4  # every 4-bit weight keeps its 16 code values, and of 8-bit constants their 256
_SECOND_TABLE = 256 * 4
_EIGHT_BIT_BLOCK = 256  # optimizer states that share a constant
_EIGHT_BIT_LEAST = 4096  # smaller tensors keep float32 states
_PADDING = 8  # safetensors aligns its header


def base_bytes(base: Mapping[str, Tensor], quantised: set[str], section: QuantizationConfig) -> dict[str, int]:
    """Bytes by kind of storage: a dtype's name, ``nf4`` (or fp4, int8) and ``constants``. Shared tensors once."""
    sizes: dict[str, int] = defaultdict(int)
    for name, tensor in {id(tensor): (name, tensor) for name, tensor in base.items()}.values():
        if name in quantised:
            stored, constants = quantised_bytes(tensor, section)
            sizes[section.name] += stored
            sizes["constants"] += constants
        else:
            sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel() * tensor.element_size()
    return dict(sizes)


def quantised_bytes(weight: Tensor, section: QuantizationConfig) -> tuple[int, int]:
    """(bytes of the values, bytes of the constants that scale them) of one quantised weight (out, in)."""
    if section.name == "int8":
        return weight.numel(), 4 * weight.shape[0]
    blocks = -(-weight.numel() // section.block_size)
    stored = -(-weight.numel() // 2)
    if not section.double_quant:
        return stored, 4 * blocks + _TABLE
    return stored, blocks + 4 * -(-blocks // _SECOND_BLOCK) + 4 + _TABLE + _SECOND_TABLE  # 4: their mean


def unpacked_bytes(weight: Tensor, section: QuantizationConfig) -> int:
    """The most that a quantised weight, ``weight`` in the dtype of its products, takes while it is unpacked."""
    size = weight.element_size()
    return weight.numel() * (8 if section.name == "int8" else size)  # 8: int8 is scaled in float32 twice


def optimizer_bytes(trained: list[nn.Parameter], section: OptimizerConfig) -> int:
    """AdamW's two states a parameter: float32 each, or 8 bit in blocks with a float32 constant."""
    return sum(_state_bytes(parameter, section.name.endswith("8bit")) for parameter in trained)


def file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """A safetensors file of ``tensors``."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    length = len(json.dumps(header, separators=(",", ":")))
    return 8 + -(-length // _PADDING) * _PADDING + end


def _state_bytes(parameter: nn.Parameter, eight_bit: bool) -> int:
    count = parameter.numel()
    if eight_bit and count >= _EIGHT_BIT_LEAST:
        return 2 * (count + 4 * -(-count // _EIGHT_BIT_BLOCK))
    return 2 * count * parameter.element_size() + 4  # 4: the step
