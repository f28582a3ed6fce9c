"""What torch leaves untyped of what is used here, with the types that it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., object])


class Context(Protocol):
    """What a function's forward and backward get from torch; what a function notes on it itself is in a subclass."""

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """Tensors and None, as they were saved."""

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...


class TensorFunction(torch.autograd.Function):
    """One that returns a tensor."""

    if TYPE_CHECKING:

        @classmethod
        def apply(cls, *inputs: object) -> Tensor: ...


def not_compiled(function: _Function) -> _Function:
    """Decorates what torch.compile leaves to Python."""
    disabled: _Function = torch.compiler.disable(function)
    return disabled


def not_compiled_itself(function: _Function) -> _Function:
    """The same, but what it calls is compiled."""
    disabled: _Function = torch.compiler.disable(function, recursive=False)
    return disabled
