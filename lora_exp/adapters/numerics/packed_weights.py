"""What bitsandbytes' layers store, known by name: it is imported only where there is something to dequantise."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Protocol, cast

import torch
from torch import Tensor, nn


class QuantState(Protocol):
    """How a 4-bit weight was packed: `state2` and `offset` where its constants are quantised in their turn."""

    absmax: Tensor
    shape: torch.Size
    dtype: torch.dtype
    nested: bool
    blocksize: int
    quant_type: str
    offset: Tensor
    state2: QuantState

    def to(self, device: torch.device) -> None: ...


class FourBit(Protocol):
    """What a 4-bit parameter has beside its values."""

    quant_state: QuantState
    quant_storage: torch.dtype


class EightBitState(Protocol):
    """Where an 8-bit layer keeps them after its first call."""

    CB: Tensor | None
    SCB: Tensor | None
    has_fp16_weights: bool


class EightBit(Protocol):
    """What an 8-bit parameter has beside its values: their other name, and the rows' constants."""

    data: Tensor
    CB: Tensor | None
    SCB: Tensor | None


def quant_state(weight: object) -> QuantState | None:
    """A 4-bit weight's; None for any other."""
    return getattr(weight, "quant_state", None)


def is_quantised(weight: object) -> bool:
    """Whether a parameter holds packed 4-bit or 8-bit values of bitsandbytes.

    Asked of its attributes: pickle gives back a plain nn.Parameter that has them.
    """
    is_eight_bit = isinstance(weight, Tensor) and hasattr(weight, "SCB") and weight.dtype == torch.int8
    return is_eight_bit or quant_state(weight) is not None


def recover_class(weight: object) -> None:
    """Give a quantised parameter the class again that pickle loses: moving, counting and requantising need it."""
    if type(weight) is nn.Parameter and is_quantised(weight):
        modules = importlib.import_module("bitsandbytes.nn.modules")
        weight.__class__ = modules.Params4bit if hasattr(weight, "quant_state") else modules.Int8Params
        if getattr(weight, "CB", None) is not None:
            packed = cast(EightBit, weight)
            packed.CB = packed.data  # one memory again, not two


def constants(module: nn.Module, weight: Tensor) -> list[Tensor]:
    """What it takes to dequantise a weight of `module` beside its packed values; [] for a plain parameter."""
    if (state := quant_state(weight)) is not None:
        nested = [state.state2.absmax, state.offset] if state.nested else []
        return [state.absmax, *nested]
    if not is_quantised(weight):
        return []
    own = cast(EightBit, weight).SCB
    found = cast(EightBitState, module.state).SCB if own is None else own
    assert found is not None
    return [found]


def bring_constants(weight: Tensor) -> None:
    """Bring a quantised weight's constants to the device that its packed values were moved to."""
    if (state := quant_state(weight)) is not None:
        state.to(weight.device)
    elif is_quantised(weight):
        packed = cast(EightBit, weight)
        if packed.SCB is not None and packed.SCB.device != weight.device:
            packed.CB, packed.SCB = packed.data, packed.SCB.to(weight.device)


def moved_to(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    """The parameter itself where it is there already, else a copy, a quantised one with its constants."""
    if parameter.device == device:
        return parameter
    if is_quantised(parameter):
        return cast(nn.Parameter, parameter.to(device))
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


def functional() -> ModuleType:
    """bitsandbytes' own, imported when it is needed."""
    return importlib.import_module("bitsandbytes.functional")
