"""Adapted linear layers as one step of autograd: no (M, N) temporaries, x retained once.

Letters: M rows (all leading dimensions of x in one), K inputs, N outputs, r rank. LoRA adds c * z B to the
base product, with z = d A, d = x or x ∘ mask, c = scale / keep. DoRA multiplies the whole product for d with
g = magnitude / norm, the norm being a constant (arXiv 2402.09353 §4.3). Gradients for G = ∂loss/∂out:

    dz = c G (g∘B)ᵀ    dA = dᵀ dz    dB = c g∘(zᵀ G)    dx = (g∘G) W + mask ∘ (dz Aᵀ)    (g = 1 for LoRA)

With dropout the frozen path sees all of x: out = x Wᵀ + b + (g-1)∘(d Wᵀ)/keep + g∘(c z B), as in PEFT.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.linear_lanes import Lanes
from lora_exp.adapters.kernels.linear_rows import add_share, share_gradients, weighted_gradient
from lora_exp.adapters.kernels.terms import Share, Terms, as_dtype
from lora_exp.adapters.numerics.autocast import autocast_dtype, autocast_input, without_autocast
from lora_exp.adapters.numerics.first_derivative import first_derivative_only, no_forward_mode
from lora_exp.adapters.numerics.matmul import runs_wide, times, times_transposed, uses_onednn
from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction

_AS_IT_IS = nullcontext()
_INSTEAD = "run forward inside lora_exp.adapters.use_reference()"
Served = Sequence[tuple[Terms | None, slice | None]]  # each with its slice of the leading dimension; None is all of it

_Flat = Sequence[Any]  # A, B and magnitude, a tensor or None, of part after part


def fused_linear(host: Host, x: Tensor, served: Served) -> Tensor:
    """The adapted layer's output for x (..., K): (..., N)."""
    each = x[0].numel() // x.shape[-1] if len(served) > 1 and x.numel() else 0  # rows of one leading index
    flat = [(terms, _flat_rows(rows, each)) for terms, rows in served]
    spans = [(None if terms is None else Share(rows, terms), rows) for terms, rows in flat]
    x = autocast_input(x)
    wide = _is_wide(host, x)
    parts = [share for share, _ in spans if share is not None]
    lanes = Lanes.of(spans) if host.route.batches_lanes else None
    call = _Call(host, parts, lanes, wide, wide or _is_by_onednn(host, x))
    return _Adapted.apply(call, x, *(factor for terms, _ in served if terms is not None for factor in terms.factors))


def _flat_rows(rows: slice | None, each: int) -> slice | None:
    return None if rows is None else slice(rows.start * each, rows.stop * each)


class _Call:
    """One call of a host: which adapters serve which rows, as lanes if in one batched product, whether 16-bit values
    are float32 inside, and whether the products with W are ours or the layer's own."""

    __slots__ = ("host", "lanes", "ours", "parts", "wide")

    def __init__(self, host: Host, parts: Sequence[Share], lanes: Lanes | None, wide: bool, ours: bool) -> None:
        self.host, self.parts, self.lanes, self.wide, self.ours = host, parts, lanes, wide, ours

    def inside(self, x: Tensor) -> Tensor:
        """(M, K) x or (M, N) G in what is computed in."""
        return as_dtype(_flat(x), torch.float32) if self.wide else _flat(x)

    def product(self, x: Tensor) -> Tensor:
        """x Wᵀ (M, N), a tensor to write to."""
        if self.ours:
            return times_transposed(x, self.matrix())
        return self.host.linear_forward(x).contiguous()

    def base(self, x: Tensor) -> Tensor:
        """x Wᵀ + b (M, N), likewise."""
        if not self.ours:
            return self.host.base_forward(x).contiguous()
        product, bias = self.product(x), self.host.bias
        return product if bias is None else product.add_(bias)

    def matrix(self, known: Tensor | None = None) -> Tensor:
        """(N, K) W"""
        weight = self.host.dense_weight() if known is None else known
        return weight if self.host.out_axis == 0 else weight.T

    def matrix_for(self, grad: Tensor, known: Tensor | None) -> Tensor:
        """W for G W; what is float32 inside converts it some rows at a time."""
        return self.matrix(known) if self.wide else as_dtype(self.matrix(known), grad.dtype)


class _Context(Context, Protocol):
    call: _Call
    like: tuple[torch.Size, torch.dtype]


class _Adapted(TensorFunction):
    """(call, x (..., K), A (K, r), B (r, N), magnitude (N,) or None, A, B, ...) -> (..., N)"""

    @staticmethod
    def forward(ctx: _Context, call: _Call, x: Tensor, *factors: Tensor | None) -> Tensor:
        with without_autocast(x.device.type) if call.wide else _AS_IT_IS:
            out, kept = _output(call, call.inside(x), factors)
        needs, weight = ctx.needs_input_grad[2:], call.host.weight
        kept = _worth_keeping(call, kept, needs, x.dtype)
        # A quantised base is dequantised again in backward instead of being retained.
        ctx.call, ctx.like = call, (x.shape, x.dtype)
        kept_x = x if any(needs[::3]) else None
        ctx.save_for_backward(kept_x, weight if weight.is_floating_point() else None, *factors, *kept)
        out = as_dtype(out, x.dtype)
        # Detached, so that it is no view to autograd, which forbids to write to views that a Function returns.
        return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1]).detach()

    jvp = staticmethod(no_forward_mode(_INSTEAD))

    @staticmethod
    @first_derivative_only(_INSTEAD)
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad = grads[0]
        with without_autocast(grad.device.type):
            return _gradients(ctx, grad)


def _output(call: _Call, x: Tensor, factors: _Flat) -> tuple[Tensor, list[Tensor | None]]:
    """The output (M, N) for x (M, K), and z and the product of each part; of lanes one z."""
    parts = call.parts
    if call.lanes is not None:
        out = call.base(x)
        return out, [call.lanes.add(x, out, _without_magnitudes(factors))]
    kept: list[Tensor | None] = []
    bare = any(part.scales_base for part in parts)
    base = call.product(x) if bare else call.base(x)
    out = _with_bias(call.host, base, parts) if bare else base
    for i, part in enumerate(parts):
        views = _rows(part, x), _rows(part, base), _rows(part, out)
        kept += add_share(part, call.product, call.host.bias, *views, *factors[3 * i : 3 * i + 3])
    return out, kept


def _worth_keeping(
    call: _Call, kept: list[Tensor | None], needs: Sequence[bool], dtype: torch.dtype
) -> list[Tensor | None]:
    """What backward asks for. z serves dB alone; in float32 it would take twice the bytes, and x is kept anyway."""
    if call.lanes is not None:
        return kept if any(needs[1::3]) and not (call.wide and any(needs[::3])) else [None]
    for i in range(0, len(kept), 2):
        if not needs[3 * i // 2 + 1] or (call.wide and needs[3 * i // 2]):
            kept[i] = None
        if (product := kept[i + 1]) is not None:
            kept[i + 1] = as_dtype(product, dtype) if needs[3 * i // 2 + 2] else None
    return kept


def _with_bias(host: Host, base: Tensor, parts: Sequence[Share]) -> Tensor:
    """An output for `base`, which has no bias: filled except where a part will write its rows whole."""
    out = torch.empty_like(base)
    if not all(part.scales_base for part in parts) or _leaves_rows(parts, base):
        out.copy_(base if host.bias is None else base + as_dtype(host.bias, base.dtype))
    return out


def _gradients(ctx: _Context, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, *rest = ctx.saved_tensors
    call, (shape, dtype) = ctx.call, ctx.like
    parts, G, needs = call.parts, call.inside(grad), ctx.needs_input_grad[1:]
    factors, kept = rest[: 3 * len(parts)], rest[3 * len(parts) :]
    if call.lanes is not None:
        dx = times(G, call.matrix_for(G, weight)) if needs[0] else None
        pairs, wanted = _without_magnitudes(factors), _without_magnitudes(needs[1:])
        own = call.lanes.gradients(G, None if x is None else _flat(x), pairs, kept[0], wanted, dx)
        threes = [gradient for i in range(len(parts)) for gradient in (*own[2 * i : 2 * i + 2], None)]
        return None, None if dx is None else as_dtype(dx, dtype).view(shape), *threes
    weighted = [
        weighted_gradient(part, _rows(part, G), factors[3 * i + 2], kept[2 * i + 1], needs[3 * i + 3], needs[0])
        for i, part in enumerate(parts)
    ]
    dx, found = None, []
    if needs[0]:
        weight = call.matrix_for(G, weight)
        dx = times(_joined(G, parts, [rows for rows, _ in weighted]), weight)
    for i, (part, (rows, dm)) in enumerate(zip(parts, weighted, strict=True)):
        seen = None if x is None else _rows(part, _flat(x))
        to = None if dx is None else (_rows(part, dx), weight)
        given = rows, seen, needs[3 * i + 1 : 3 * i + 3], factors[3 * i : 3 * i + 3], kept[2 * i]
        found += [*share_gradients(part, _rows(part, G), *given, to), dm]
    return None, None if dx is None else as_dtype(dx, dtype).view(shape), *found


def _joined(grad: Tensor, parts: Sequence[Share], weighted: Sequence[Tensor | None]) -> Tensor:
    """What W takes back to dx: G, or g∘G in the rows of DoRA without dropout."""
    if parts[0].rows is None:
        return grad if weighted[0] is None or not parts[0].scales_base else weighted[0]
    changed = [(part.rows, rows) for part, rows in zip(parts, weighted, strict=True) if part.scales_base]
    out = grad.clone() if changed else grad
    for rows, seen in changed:
        assert seen is not None
        out[rows] = seen
    return out


def _without_magnitudes(each: Sequence[Any]) -> list[Any]:
    """A, B, A, B, … of A, B, magnitude, A, …"""
    return [value for i, value in enumerate(each) if i % 3 < 2]


def _rows(part: Share, of: Tensor) -> Tensor:
    """The part's rows; slicing costs as much as a small product, so not where it is all of them."""
    return of if part.rows is None else of[part.rows]


def _leaves_rows(parts: Sequence[Share], of: Tensor) -> bool:
    return all(part.rows is not None for part in parts) and _covered(parts) < of.shape[0]


def _covered(parts: Sequence[Share]) -> int:
    return sum(part.rows.stop - part.rows.start for part in parts if part.rows is not None)


def _is_wide(host: Host, x: Tensor) -> bool:
    """Whether the call is computed in float32, be it x or the base's own products that would have 16 bits."""
    dtype = x.dtype if x.dtype.itemsize == 2 else host.compute_dtype or x.dtype
    if dtype.itemsize != 2 or x.dtype is torch.float64:
        return False
    weight, kind = host.weight, x.device.type
    if weight.dtype is not x.dtype and weight.is_floating_point() and autocast_dtype(kind) is None:
        return False  # the layer itself will say that they do not fit
    return runs_wide(dtype, kind, x.numel() // max(1, x.shape[-1]))


def _is_by_onednn(host: Host, x: Tensor) -> bool:
    """Whether all of the call is float32 and oneDNN the faster for it."""
    if x.dtype is not torch.float32 or (host.compute_dtype or x.dtype) is not x.dtype:
        return False
    stored = host.weight.dtype if host.weight.is_floating_point() else host.merged_dtype
    return stored is x.dtype and uses_onednn(x.dtype, x.device.type, x.numel() // max(1, x.shape[-1]))


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
