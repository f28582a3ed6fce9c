"""All or nothing: what changes a model in many steps leaves it as it was when one of them fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def undone_on_failure(model: nn.Module, *others: object) -> Iterator[None]:
    """Put every module of `model`, and each other object, back as it was if the body does not get to its end.

    Classes, attributes, children, parameters (which they are, not their values), hooks, modes and requires_grad.
    """
    objects = [_Remembered(one) for one in (*others, *model.modules())]
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:  # Ctrl-C too
        for one in objects:
            one.put_back()
        for parameter, requires_grad in wanted:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
        raise


@contextmanager
def values_undone_on_failure(*tensors: Tensor) -> Iterator[None]:
    """Put the tensors' values back if the body does not get to its end; takes a copy of each."""
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        for tensor, value in zip(tensors, kept, strict=True):
            tensor.detach().copy_(value)
        raise


class _Remembered:
    """An object's class and attributes; an attribute that is a dict (children, hooks) with its entries."""

    def __init__(self, one: object) -> None:
        self.one = one
        self.kind = type(one)
        self.attributes = dict(vars(one))
        self.entries: list[tuple[dict[object, object], dict[object, object]]] = [
            (value, dict(value)) for value in self.attributes.values() if isinstance(value, dict)
        ]

    def put_back(self) -> None:
        if type(self.one) is not self.kind:
            self.one.__class__ = self.kind
        own = vars(self.one)  # not by setattr, which torch's modules make more of
        own.clear()
        own.update(self.attributes)
        for live, kept in self.entries:
            live.clear()
            live.update(kept)
