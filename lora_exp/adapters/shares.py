"""One adapter's share of a fused linear layer: its rows of the output, and their gradients.

Letters: m rows of the share, K inputs, N outputs, r rank; the formulas are those of `fused`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .masks import dropout_mask, keep_share
from .products import wide_product


class Share:
    """One adapter's slice of the rows. `norm` (N,) is None for LoRA; p is 0 without dropout.

    boost is 1 / keep, factor is c; scales_base says whether the base product itself is multiplied with g,
    so that it must come without its bias.
    """

    __slots__ = ("boost", "factor", "norm", "p", "rows", "scale", "scales_base", "seed")

    def __init__(self, rows: slice, scale: float, p: float, seed: int, norm: Any) -> None:
        self.rows, self.scale, self.p, self.seed, self.norm = rows, scale, p, seed, norm
        self.boost = 1 / keep_share(p) if p else 1.0
        self.factor = scale * self.boost
        self.scales_base = norm is not None and not p

    def mask(self, like: Tensor | None) -> Tensor | None:
        """(m, K) of 0 and 1, the same whenever asked."""
        return dropout_mask(like, self.p, self.seed) if self.p and like is not None else None

    def ratio(self, magnitude: Tensor, dtype: torch.dtype) -> Tensor:
        """(N,) g"""
        return as_dtype(magnitude / self.norm, dtype)


def as_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x.to(dtype) at a tenth of the cost where nothing is to do; small layers feel it."""
    return x if x.dtype is dtype else x.to(dtype)


def add_share(
    share: Share, layer: Any, x: Tensor, base: Tensor, out: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Write one adapter's rows of `out` in place. Returns z (m, r) and, for DoRA, what g multiplies (m, N)."""
    mask = share.mask(x)
    d = x if mask is None else mask.mul_(x)
    z = d @ as_dtype(A, x.dtype)
    low = as_dtype(z, out.dtype), as_dtype(B, out.dtype)
    if magnitude is None:
        out.addmm_(*low, alpha=share.factor)
        return z, None
    g = share.ratio(magnitude, out.dtype)
    if mask is None:
        product = base.addmm_(*low, alpha=share.scale)
        bias = None if layer.bias is None else as_dtype(layer.bias, out.dtype)
        torch.mul(product, g, out=out) if bias is None else torch.addcmul(bias, product, g, out=out)
    else:
        product = layer.linear_forward(d)
        out.sub_(product, alpha=share.boost)
        product.addmm_(*low, alpha=share.scale)
        out.addcmul_(product, g, value=share.boost)
    return z, product


def share_gradients(
    share: Share,
    grad: Tensor,
    x: Tensor | None,
    needs: Sequence[bool],
    factors: Sequence[Tensor],
    kept: Sequence[Tensor],
    to: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dA, dB and dmagnitude for G = `grad` (m, N); adds to dx (m, K) if `to` holds it and W (N, K)."""
    A, B, magnitude = factors
    z, product = kept[:2]
    g = None if magnitude is None else share.ratio(magnitude, grad.dtype)
    dA = dB = dm = None
    if needs[1]:
        dB = as_dtype(as_dtype(z, grad.dtype).T @ grad, B.dtype)
        dB.mul_(share.factor if g is None else share.ratio(magnitude, B.dtype) * share.factor)
    if needs[2]:
        dm = (grad * product).sum(0, dtype=magnitude.dtype).mul_(share.boost / share.norm)
    if needs[0] or to is not None:
        b = as_dtype(B, grad.dtype)
        dz = (grad @ (b if g is None else b * g).T).mul_(share.factor)
        mask = share.mask(x if to is None else to[0])
        if to is not None:
            _add_to_input(share, grad, as_dtype(dz, to[0].dtype), as_dtype(A, to[0].dtype).T, g, mask, *to)
        if needs[0]:
            assert x is not None
            d = x if mask is None else mask.mul_(x)
            # As (r, K) first: twice as fast as dᵀ dz for a narrow dz.
            dA = (as_dtype(dz, d.dtype).T @ d).T.to(A.dtype, memory_format=torch.contiguous_format)
    return dA, dB, dm


def _add_to_input(
    share: Share,
    grad: Tensor,
    dz: Tensor,
    At: Tensor,
    g: Tensor | None,
    mask: Tensor | None,
    dx: Tensor,
    weight: Tensor,
) -> None:
    """dx += mask ∘ (dz Aᵀ), and for DoRA with dropout also mask ∘ (((g-1)/keep ∘ G) W)."""
    if mask is None:
        dx.addmm_(dz, At)
        return
    low = dz @ At if g is None else wide_product(grad * ((g - 1) * share.boost), weight)
    if g is not None:
        low.addmm_(dz, At)
    dx.addcmul_(low, mask)
