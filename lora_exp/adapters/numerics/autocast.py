"""Autocast as adapted layers meet it: asked for, switched off, and stood in for on the meta device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()
_on_meta: torch.dtype | None = None


@contextmanager
def autocast_on_meta(dtype: torch.dtype | None) -> Iterator[None]:
    """Autocast for the meta device, which plans run on and which torch has none for; None is off."""
    global _on_meta
    outer, _on_meta = _on_meta, dtype
    try:
        yield
    finally:
        _on_meta = outer


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """No autocast on devices of this kind, at no cost where it is off."""
    if autocast_dtype(kind) is None:
        return _AS_IT_IS
    return autocast_on_meta(None) if kind == "meta" else torch.autocast(kind, enabled=False)


def autocast_dtype(kind: str) -> torch.dtype | None:
    """What autocast computes in on devices of this kind; None where it is off."""
    if kind == "meta":
        return _on_meta
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if is_on else None


def autocast_input(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)
