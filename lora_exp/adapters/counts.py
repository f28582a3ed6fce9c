"""How many parameters there are, as the user thinks of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn


def count_parameters(trained: Iterable[nn.Parameter], everything: Iterable[nn.Parameter]) -> tuple[int, int]:
    """(parameters in `trained`, parameters in `everything`), shared ones once."""
    return _total(trained), _total(everything)


def logical_numel(parameter: Any) -> int:
    """A 4-bit weight packs two values into a byte; count the values (peft#1020)."""
    if type(parameter).__name__ != "Params4bit":
        return int(parameter.numel())
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(parameter.numel() * 2 * parameter.element_size()) if parameter.shape[-1] == 1 else parameter.numel()


def _total(parameters: Iterable[nn.Parameter]) -> int:
    return sum(logical_numel(one) for one in {id(p): p for p in parameters}.values())
