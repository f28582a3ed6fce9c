"""What bitsandbytes' layers store, known by name: it is imported only where there is something to dequantise."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def is_quantised(weight: Any) -> bool:
    """Whether a parameter holds packed 4-bit or 8-bit values of bitsandbytes."""
    return getattr(weight, "quant_state", None) is not None or (
        type(weight).__name__ == "Int8Params" and weight.dtype == torch.int8
    )


def constants(module: Any, weight: Any) -> list[Tensor]:
    """What it takes to dequantise a weight of `module` beside its packed values; [] for a plain parameter."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.state2.absmax, state.offset] if state.nested else []
        return [state.absmax, *nested]
    if not is_quantised(weight):
        return []
    return [weight.SCB if weight.SCB is not None else module.state.SCB]


def keep_trainable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference in bfloat16, which it does on some CPUs.

    The first evaluation would turn the base into another one, rounded, that passes no gradient on.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
            if getattr(getattr(module.weight, "quant_state", None), "packing_format_for_cpu", False):
                module._save_to_state_dict({}, "", True)  # unpacks


def functional() -> Any:
    """bitsandbytes' own, imported when it is needed."""
    return importlib.import_module("bitsandbytes.functional")
