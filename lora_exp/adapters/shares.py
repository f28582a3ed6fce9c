"""One adapter's share of a fused linear layer: its rows of the output, and their gradients.

Letters: m rows of the share, K inputs, N outputs, r rank; the formulas are those of `fused`. Each (m, N) or (m, K)
pass over memory costs a small layer a percent of its time, so they are few, and their buffers are used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .masks import dropout_mask, keep_share
from .products import add_product


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
    share: Share,
    product: Callable[[Tensor], Tensor],
    bias: Tensor | None,
    x: Tensor,
    base: Tensor,
    out: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Write one adapter's rows of `out` in place; product(d) is d Wᵀ.

    Returns z (m, r) and, for DoRA, what g multiplies (m, N).
    """
    mask = share.mask(x)
    d = x if mask is None else mask.mul_(x)
    z = torch.mm(d, as_dtype(A, x.dtype))
    low = as_dtype(z, out.dtype), as_dtype(B, out.dtype)
    if magnitude is None:
        out.addmm_(*low, alpha=share.factor)
        return z, None
    g = share.ratio(magnitude, out.dtype)
    if mask is None:
        seen = base.addmm_(*low, alpha=share.scale)
        torch.mul(seen, g, out=out) if bias is None else torch.addcmul(as_dtype(bias, out.dtype), seen, g, out=out)
    else:
        seen = product(d)
        out.sub_(seen, alpha=share.boost)
        seen.addmm_(*low, alpha=share.scale)
        out.addcmul_(seen, g, value=share.boost)
    return z, seen


def share_gradients(
    share: Share,
    grad: Tensor,
    x: Tensor | None,
    needs: Sequence[bool],
    factors: Sequence[Tensor],
    kept: Sequence[Tensor],
    to: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor]:
    """dA, dB and dmagnitude for G = `grad` (m, N), and what W is still to take back to dx: G, or g∘G (m, N).

    Writes the rest of dx (m, K) if `to` holds it and W (N, K). Without a kept z it is computed again.
    """
    A, B, magnitude = factors
    z, seen = kept[:2]
    g = None if magnitude is None else share.ratio(magnitude, grad.dtype)
    a, b = as_dtype(A, grad.dtype), as_dtype(B, grad.dtype)
    dA = dB = dm = dz = None
    x = None if x is None else as_dtype(x, grad.dtype)
    weighted, mask = grad, share.mask(x if to is None else to[0])
    if g is not None and (needs[2] or to is not None):
        weighted, dm = _weighted(share, grad, g, seen if needs[2] else None, magnitude.dtype)
    if needs[0] or to is not None:
        dz = torch.mm(grad, (b if g is None else b * g).T)  # without its factor c
    if to is not None and dz is not None:
        _write_input(share, mask, dz, a, None if g is None else weighted, *to)
    d = x if x is None or mask is None else mask.mul_(x)
    if needs[1]:
        dB = _scaled_product(b, (torch.mm(d, a) if z is None else as_dtype(z, grad.dtype)).T, grad, share.factor)
        dB = as_dtype(dB, B.dtype) if g is None else as_dtype(dB, B.dtype).mul_(share.ratio(magnitude, B.dtype))
    if needs[0] and dz is not None and d is not None:
        # As (r, K) first: twice as fast as dᵀ dz for a narrow dz.
        dA = _scaled_product(a.T, dz.T, d, share.factor).T.to(A.dtype, memory_format=torch.contiguous_format)
    return dA, dB, dm, grad if share.p else weighted


def _weighted(
    share: Share, grad: Tensor, g: Tensor, seen: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """g∘G, with dropout (g-1)/keep ∘ G (m, N), and dmagnitude if `seen`, what g multiplied, is given."""
    weight = (g - 1).mul_(share.boost) if share.p else g
    if seen is None:
        return grad * weight, None
    buffer = grad * as_dtype(seen, grad.dtype)
    dm = buffer.sum(0, dtype=dtype).mul_(share.boost / share.norm)
    return torch.mul(grad, weight, out=buffer), dm


def _write_input(
    share: Share,
    mask: Tensor | None,
    dz: Tensor,
    A: Tensor,
    weighted: Tensor | None,
    dx: Tensor,
    weight: Tensor,
) -> None:
    """dx = mask ∘ (c dz Aᵀ), for DoRA with dropout mask ∘ (((g-1)/keep ∘ G) W + c dz Aᵀ)."""
    dx.addmm_(dz, A.T, beta=0, alpha=share.factor)
    if mask is not None:
        whole = dx if weighted is None else add_product(dx, weighted, weight)
        torch.mul(whole, mask, out=dx)


def _scaled_product(like: Tensor, left: Tensor, right: Tensor, factor: float) -> Tensor:
    """factor * left right, in one step; `like` has the result's shape, its values are not read."""
    return torch.addmm(like, left, right, beta=0, alpha=factor)
