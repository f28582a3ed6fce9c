"""One adapter's share of a fused linear layer: its rows of the output, and their gradients.

Letters: m rows of the share, K inputs, N outputs, r rank; the formulas are those of `linear`. Each (m, N) or (m, K)
pass over memory costs a small layer a percent of its time, so they are few, and their buffers are used again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_exp.adapters.kernels.terms import Share, as_dtype
from lora_exp.adapters.numerics.matmul import factor_product, times, times_transposed


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
    z = times_transposed(d, as_dtype(A, x.dtype).T)
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


def weighted_gradient(
    share: Share, grad: Tensor, magnitude: Tensor | None, seen: Tensor | None, needs: bool, needs_input: bool
) -> tuple[Tensor | None, Tensor | None]:
    """g∘G, with dropout (g-1)/keep ∘ G (m, N), if dx needs it, and dmagnitude if it is needed; None for LoRA.

    `seen` (m, N) is what g multiplies.
    """
    if magnitude is None or not (needs or needs_input):
        return None, None
    g = share.ratio(magnitude, grad.dtype)
    weight = (g - 1).mul_(share.boost) if share.p else g
    if seen is None or not needs:
        return grad * weight, None
    buffer = grad * as_dtype(seen, grad.dtype)
    dm = buffer.sum(0, dtype=magnitude.dtype).mul_(share.boost / share.norm)
    return torch.mul(grad, weight, out=buffer) if needs_input else None, dm


def share_gradients(
    share: Share,
    grad: Tensor,
    weighted: Tensor | None,
    x: Tensor | None,
    needs: Sequence[bool],
    factors: Sequence[Tensor],
    z: Tensor | None,
    to: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor | None, Tensor | None]:
    """dA and dB for G = `grad` (m, N); without a kept z it is computed again.

    Adds what goes back through A, and `weighted` in the dropped rows, to dx (m, K), if `to` holds it and W (N, K).
    """
    A, B, magnitude = factors
    g = None if magnitude is None else share.ratio(magnitude, grad.dtype)
    a, b = as_dtype(A, grad.dtype), as_dtype(B, grad.dtype)
    dA = dB = dz = None
    x = None if x is None else as_dtype(x, grad.dtype)
    mask = share.mask(x if to is None else to[0])
    if needs[0] or to is not None:
        dz = times_transposed(grad, b if g is None else b * g)  # without its factor c
    if to is not None and dz is not None:
        _add_input(share, mask, dz, a, weighted, *to)
    d = x if x is None or mask is None else mask.mul_(x)
    if needs[1]:
        if z is None:
            assert d is not None  # kept wherever z is not
            z = times_transposed(d, a.T)
        dB = as_dtype(factor_product(as_dtype(z, grad.dtype), grad, share.factor), B.dtype)
        dB = dB if g is None else dB.mul_(share.ratio(magnitude, B.dtype))
    if needs[0] and dz is not None and d is not None:
        # As (r, K) first: twice as fast as dᵀ dz for a narrow dz.
        dA = factor_product(dz, d, share.factor).T.to(A.dtype, memory_format=torch.contiguous_format)
    return dA, dB


def _add_input(
    share: Share,
    mask: Tensor | None,
    dz: Tensor,
    A: Tensor,
    weighted: Tensor | None,
    dx: Tensor,
    weight: Tensor,
) -> None:
    """dx += mask ∘ (c dz Aᵀ), for DoRA with dropout mask ∘ (((g-1)/keep ∘ G) W + c dz Aᵀ)."""
    if mask is None:
        dx.addmm_(dz, A.T, alpha=share.factor)
    elif weighted is None:
        dx.addcmul_(torch.mm(dz, A.T), mask, value=share.factor)
    else:
        dx.addcmul_(times(weighted, weight).addmm_(dz, A.T, alpha=share.factor), mask)
