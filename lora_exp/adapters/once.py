"""Hand-written gradients have no gradient of their own: asked for one, they say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

Backward = Callable[..., tuple[Any, ...]]


def first_derivative_only(instead: str) -> Callable[[Backward], Backward]:
    """Decorates a Function's backward: a second derivative raises RuntimeError and names what to do `instead`.

    torch's own once_differentiable is silent where the incoming gradient is a constant, as after sum().
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Any) -> tuple[Any, ...]:
            if not torch.is_grad_enabled():  # no create_graph
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            message = f"this gradient is written by hand and cannot be differentiated again; {instead}"
            refuse: Any = torch._C._functions.DelayedError(message.encode(), len(found))
            return refuse(*[None if value is None else value.detach().requires_grad_() for value in found])

        return run

    return decorate
