"""A model of one's own over weights that others read too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_exp.adapters.numerics.packed_weights import quant_state

if TYPE_CHECKING:
    from torch import nn


def twin(base: nn.Module) -> nn.Module:
    """``base`` again: its modules, config and buffers are copies, its parameters are the very same.

    Whatever is done to the twin's layers, hooks, modes and buffers, ``base`` stays as it was, as long as nobody writes
    to a parameter. A 4-bit weight's constants are the same, too.
    """
    return copy.deepcopy(base, {id(one): one for parameter in base.parameters() for one in _kept(parameter)})


def _kept(parameter: nn.Parameter) -> Iterator[object]:
    yield parameter
    yield from (value for value in vars(parameter).values() if hasattr(value, "data_ptr"))  # 8-bit constants
    if (state := quant_state(parameter)) is not None:
        yield state
