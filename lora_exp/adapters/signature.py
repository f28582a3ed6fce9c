"""A wrapper whose forward has the wrapped model's signature, for those who inspect it.

transformers' Trainer drops the data's columns that forward does not name, and reads from the *class* which of its
arguments are labels. So a LoraModel gets a class of its own for each class that it wraps, as adapted layers do.
"""

from __future__ import annotations

import inspect
import types
from typing import TypeVar

from torch import nn

_Made = TypeVar("_Made")
_MADE: dict[tuple[type, type], type] = {}


def class_like(kind: type, wrapped: nn.Module) -> type:
    """`kind`, or a subclass of it whose forward shows the signature of `wrapped.forward`."""
    forward = getattr(kind, "forward", None)
    if not isinstance(forward, types.FunctionType) or "__call__" in vars(kind):
        return kind
    is_own = "forward" in wrapped.__dict__  # of this very model, as accelerate's hooks make it
    if not is_own and (made := _MADE.get((kind, type(wrapped)))) is not None:
        return made
    try:
        signature = inspect.signature(wrapped.forward)
    except (TypeError, ValueError):  # not a Python function
        return kind
    members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "forward": _showing(forward, signature)}
    made = type(f"Lora{type(wrapped).__name__}", (kind,), {**members, "made_from": kind})
    return made if is_own else _MADE.setdefault((kind, type(wrapped)), made)


def restore(kind: type[_Made]) -> _Made:
    """An empty model of `kind`, for pickle and deepcopy to fill."""
    return kind.__new__(kind)


def _showing(forward: types.FunctionType, signature: inspect.Signature) -> types.FunctionType:
    """A copy of `forward` that says it has `signature`."""
    twin = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [p for p in signature.parameters.values() if p.name != "self"]
    twin.__signature__ = signature.replace(parameters=[own, *parameters])  # type: ignore[attr-defined]
    twin.__doc__, twin.__qualname__ = forward.__doc__, forward.__qualname__
    return twin
