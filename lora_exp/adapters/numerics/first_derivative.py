"""Hand-written gradients have no gradient of their own: asked for one, they say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NoReturn

import torch
from torch import Tensor

from lora_exp.adapters.numerics.typed_torch import Context

Backward = Callable[..., tuple[Tensor | None, ...]]


def first_derivative_only(instead: str) -> Callable[[Backward], Backward]:
    """Decorates a Function's backward: a second derivative raises RuntimeError and names what to do `instead`.

    torch's own once_differentiable is silent where the incoming gradient is a constant, as after sum().
    """

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
            if not torch.is_grad_enabled():  # no create_graph
                try:
                    return backward(ctx, *grads)
                except RuntimeError as error:
                    if not _is_batched(grads):
                        raise
                    raise RuntimeError(f"this gradient is written by hand, for one at a time; {instead}") from error
            once = _ReadOnce(ctx)
            with torch.no_grad():
                found = backward(once, *grads)
            message = f"this gradient is written by hand and cannot be differentiated again; {instead}"
            values = [None if value is None else value.detach().requires_grad_() for value in found]
            # What it depends on goes in as well, so that whoever differentiates along there comes past the refusal.
            needed = [x for x in (*once.saved_tensors, *grads) if isinstance(x, torch.Tensor) and x.requires_grad]
            refuse = torch._C._functions.DelayedError(message.encode(), len(values) + len(needed))
            refused: tuple[Tensor | None, ...] = refuse(*values, *needed)  # type: ignore[arg-type]
            return refused[: len(values)]

        return run

    return decorate


def no_forward_mode(instead: str) -> Callable[..., NoReturn]:
    """A Function's jvp that names what to do `instead`."""

    def jvp(ctx: object, *tangents: object) -> NoReturn:
        raise RuntimeError(f"this layer's gradients are written by hand, for backward alone; {instead}")

    return jvp


class _ReadOnce:
    """A Function's context whose saved tensors can be asked for twice: a checkpoint hands each out once."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self.saved_tensors = ctx.saved_tensors

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._ctx, name)
        return value


def _is_batched(grads: tuple[object, ...]) -> bool:
    """Whether gradients come several at a time (is_grads_batched, vmap)."""
    kinds = torch._C._functorch
    return any(
        isinstance(x, torch.Tensor) and (kinds.is_batchedtensor(x) or kinds.is_legacy_batchedtensor(x)) for x in grads
    )
