"""What a variant hands a kernel, so that no kernel knows a variant.

Letters: m rows of a share, K inputs, N outputs, r rank; an adapter's drawn mask and z are those of `kernels.linear`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lora_exp.adapters.numerics.dropout import dropout_mask, keep_share

Factors = tuple[Tensor, Tensor, Tensor | None]  # A, B, magnitude


@dataclasses.dataclass(slots=True)
class Terms:
    """One adapter's part in one call of a host: out = g∘(x Wᵀ + scale * (d A) B) + b, d = dropout(x).

    A and B have the host's factor shapes; they may be computed from what is trained, and get gradients if they ask
    for them. g = magnitude / norm by output feature (out,), the norm a constant; without a magnitude g is 1.
    `seed` draws the seed of the call's mask and is asked once, where `dropout` is above 0.
    """

    A: Tensor
    B: Tensor
    scale: float
    dropout: float = 0.0
    seed: Callable[[], int] = lambda: 0
    magnitude: Tensor | None = None
    norm: Tensor | None = None

    @property
    def factors(self) -> Factors:
        return self.A, self.B, self.magnitude


class Share:
    """One adapter's terms for its slice of the rows (None: all). `norm` (N,) is None for LoRA; p is 0 without dropout.

    boost is 1 / keep, factor is c; scales_base says whether the base product itself is multiplied with g,
    so that it must come without its bias.
    """

    __slots__ = ("boost", "factor", "norm", "p", "rows", "scale", "scales_base", "seed")

    def __init__(self, rows: slice | None, terms: Terms) -> None:
        self.rows, self.scale, self.p = rows, terms.scale, terms.dropout
        self.norm: Any = terms.norm
        self.seed = terms.seed() if self.p else 0
        self.boost = 1 / keep_share(self.p) if self.p else 1.0
        self.factor = self.scale * self.boost
        self.scales_base = self.norm is not None and not self.p

    def mask(self, like: Tensor | None) -> Tensor | None:
        """(m, K) of 0 and 1, the same whenever asked."""
        return dropout_mask(like, self.p, self.seed) if self.p and like is not None else None

    def ratio(self, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) g"""
        return as_dtype(magnitude / self.norm, dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype) at a tenth of the cost where nothing is to do; small layers feel it."""
    return x if x.dtype is dtype else x.to(dtype)
