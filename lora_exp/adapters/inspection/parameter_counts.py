"""How many parameters there are, as the user thinks of them, and what they take."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from lora_exp.adapters.numerics.packed_weights import constants, quant_state


def count_parameters(trained: Iterable[nn.Parameter], everything: Iterable[nn.Parameter]) -> tuple[int, int]:
    """(parameters in `trained`, parameters in `everything`), shared ones once."""
    return _total(trained), _total(everything)


def logical_numel(parameter: Tensor) -> int:
    """A 4-bit weight packs two values into a byte; count the values (peft#1020)."""
    if (state := quant_state(parameter)) is not None:
        return int(state.shape.numel())
    if type(parameter).__name__ != "Params4bit":
        return int(parameter.numel())
    return int(parameter.numel() * 2 * parameter.element_size()) if parameter.shape[-1] == 1 else parameter.numel()


def stored_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters as they are stored, quantisation constants included, shared ones once."""
    found: dict[int, Tensor] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            found.update((id(tensor), tensor) for tensor in (parameter, *constants(module, parameter)))
    return sum(tensor.numel() * tensor.element_size() for tensor in found.values())


def _total(parameters: Iterable[nn.Parameter]) -> int:
    return sum(logical_numel(one) for one in {id(p): p for p in parameters}.values())
