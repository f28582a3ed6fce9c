"""What bitsandbytes' layers store, known by name: it is imported only where there is something to dequantise."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn


def is_quantised(weight: Any) -> bool:
    """Whether a parameter holds packed 4-bit or 8-bit values of bitsandbytes.

    Asked of its attributes: pickle gives back a plain nn.Parameter that has them.
    """
    return getattr(weight, "quant_state", None) is not None or (hasattr(weight, "SCB") and weight.dtype == torch.int8)


def recover_class(weight: Any) -> None:
    """Give a quantised parameter the class again that pickle loses: moving, counting and requantising need it."""
    if type(weight) is nn.Parameter and is_quantised(weight):
        modules = importlib.import_module("bitsandbytes.nn.modules")
        found: Any = weight
        found.__class__ = modules.Params4bit if hasattr(weight, "quant_state") else modules.Int8Params
        if getattr(found, "CB", None) is not None:
            found.CB = found.data  # one memory again, not two


def constants(module: Any, weight: Any) -> list[Tensor]:
    """What it takes to dequantise a weight of `module` beside its packed values; [] for a plain parameter."""
    state = getattr(weight, "quant_state", None)
    if state is not None:
        nested = [state.state2.absmax, state.offset] if state.nested else []
        return [state.absmax, *nested]
    if not is_quantised(weight):
        return []
    return [weight.SCB if weight.SCB is not None else module.state.SCB]


def bring_constants(weight: Any) -> None:
    """Bring a quantised weight's constants to the device that its packed values were moved to."""
    if (state := getattr(weight, "quant_state", None)) is not None:
        state.to(weight.device)
    elif is_quantised(weight) and weight.SCB is not None and weight.SCB.device != weight.device:
        weight.CB, weight.SCB = weight.data, weight.SCB.to(weight.device)


def moved_to(parameter: Any, device: torch.device) -> Any:
    """The parameter itself where it is there already, else a copy, a quantised one with its constants."""
    if parameter.device == device:
        return parameter
    if is_quantised(parameter):
        return parameter.to(device)
    return nn.Parameter(parameter.detach().to(device), parameter.requires_grad)


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
