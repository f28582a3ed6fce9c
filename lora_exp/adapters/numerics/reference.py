"""The one switch between the fused and the plain path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

_AS_IT_IS = nullcontext()
_plain = os.environ.get("LORA_EXP_REFERENCE", "0") not in ("", "0")
_on_meta: torch.dtype | None = None


@contextmanager
def use_reference() -> Iterator[None]:
    """Run adapted layers as plain PyTorch formulas, without hand-written gradients or cached norms.

    For comparison and for second derivatives. LORA_EXP_REFERENCE=1 in the environment does the same for a
    whole process. With gradient checkpointing keep the backward pass inside: the replay obeys the switch too.
    """
    global _plain
    outer, _plain = _plain, True
    try:
        yield
    finally:
        _plain = outer


def fused_allowed() -> bool:
    """Not where a compiler or a function transform wants to see the formulas themselves."""
    return not (_plain or torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_transformed())


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


def is_plain(x: Tensor) -> bool:
    """A dense floating-point tensor and no subclass with rules of its own."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.is_floating_point()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()
