"""The one switch between the fused and the plain path."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_plain = os.environ.get("LORA_EXP_REFERENCE", "0") not in ("", "0")


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
    if _plain or torch.compiler.is_compiling() or _is_transformed():
        return False
    return not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]


def is_plain(x: Tensor) -> bool:
    """A dense floating-point tensor and no subclass with rules of its own."""
    return type(x) in (Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.is_floating_point()


def _is_transformed() -> bool:
    return torch._C._are_functorch_transforms_active()
