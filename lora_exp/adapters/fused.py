"""Adapted linear layers as one step of autograd: no (M, N) temporaries, x retained once.

Letters: M rows (all leading dimensions of x in one), K inputs, N outputs, r rank. LoRA adds c * z B to the
base product, with z = d A, d = x or x ∘ mask, c = scale / keep. DoRA multiplies the whole product for d with
g = magnitude / norm, the norm being a constant (arXiv 2402.09353 §4.3). Gradients for G = ∂loss/∂out:

    dz = c G (g∘B)ᵀ    dA = dᵀ dz    dB = c g∘(zᵀ G)    dx = (g∘G) W + mask ∘ (dz Aᵀ)    (g = 1 for LoRA)

With dropout the frozen path sees all of x: out = x Wᵀ + b + (g-1)∘(d Wᵀ)/keep + g∘(c z B), as in PEFT.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .dora import DoraAdapter
from .lora import LoraAdapter
from .once import first_derivative_only
from .products import wide_product
from .shares import Share, add_share, as_dtype, share_gradients
from .switch import autocast_dtype, fused_allowed, is_plain, without_autocast

if TYPE_CHECKING:
    from .layer import LoRALayerBase
    from .routing import Plan


def fused_output(layer: LoRALayerBase, x: Tensor, plan: Plan) -> Tensor | None:
    """The adapted layer's output for x (..., K), or None where only the plain path will do."""
    if not (fused_allowed() and is_plain(x)) or _trains_base(layer):
        return None
    served = _served(layer, x, plan)
    if not served or not all(_is_known(adapter) for adapter, _ in served):
        return None
    parts = [_part(layer, adapter, rows) for adapter, rows in served]
    factors = [adapter._parameters.get(key) for adapter, _ in served for key in ("lora_A", "lora_B", "magnitude")]
    return _Adapted.apply(layer, parts, _autocast(x), *factors)


def _served(layer: LoRALayerBase, x: Tensor, plan: Plan) -> list[tuple[LoraAdapter, slice]]:
    """The adapters of this layer that serve x, each with its rows; none if one input is meant for all samples."""
    if plan.sizes is None:
        adapter = layer._adapter(plan.names[0])
        return [] if adapter is None else [(adapter, slice(0, x.numel() // x.shape[-1] if x.numel() else 0))]
    if x.shape[0] == 1 < sum(plan.sizes):
        return []
    each = x[0].numel() // x.shape[-1] if x.numel() else 0  # rows of one index of the leading dimension
    spans = [(layer._adapter(name), slice(start * each, stop * each)) for name, start, stop in plan.split(x.shape[0])]
    return [(adapter, rows) for adapter, rows in spans if adapter is not None]


class _Adapted(torch.autograd.Function):
    """(layer, parts, x (..., K), A (K, r), B (r, N), magnitude (N,) or None, A, B, ...) -> (..., N)"""

    @staticmethod
    def forward(ctx: Any, layer: Any, parts: list[Share], x: Tensor, *factors: Any) -> Tensor:
        bare = any(part.scales_base for part in parts)
        base = (layer.linear_forward(x) if bare else layer.base_forward(x)).contiguous()
        out = _with_bias(layer, base, parts) if bare else base
        flat_x, flat_base, flat_out = (_flat(t) for t in (x, base, out))
        kept: list[Tensor | None] = []
        for i, part in enumerate(parts):
            views = flat_x[part.rows], flat_base[part.rows], flat_out[part.rows]
            kept += add_share(part, layer, *views, *factors[3 * i : 3 * i + 3])
        needs = ctx.needs_input_grad[3:]
        for i in range(len(parts)):
            kept[2 * i] = kept[2 * i] if needs[3 * i + 1] else None  # z serves dB alone
            kept[2 * i + 1] = kept[2 * i + 1] if needs[3 * i + 2] else None
        # A quantised base is dequantised again in backward instead of being retained.
        weight = layer.weight if layer.weight.is_floating_point() else None
        ctx.layer, ctx.parts, ctx.like = layer, parts, (x.shape, x.dtype)
        ctx.save_for_backward(x if any(needs[::3]) else None, weight, *factors, *kept)
        return out

    @staticmethod
    @first_derivative_only("run forward inside lora_exp.adapters.use_reference()")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grad = grads[0]
        with without_autocast(grad.device.type):
            return _gradients(ctx, grad)


def _with_bias(layer: Any, base: Tensor, parts: Sequence[Share]) -> Tensor:
    """An output for `base`, which has no bias: filled except where a part will write its rows whole."""
    out = torch.empty_like(base)
    if not all(part.scales_base for part in parts) or sum(p.rows.stop - p.rows.start for p in parts) < len(_flat(base)):
        out.copy_(base if layer.bias is None else base + as_dtype(layer.bias, base.dtype))
    return out


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    x, weight, *rest = ctx.saved_tensors
    parts, (shape, dtype) = ctx.parts, ctx.like
    factors, kept = rest[: 3 * len(parts)], rest[3 * len(parts) :]
    flat = grad.reshape(-1, grad.shape[-1])
    weight = _matrix(ctx.layer, weight, flat.dtype) if ctx.needs_input_grad[2] else None
    dx = None if weight is None else wide_product(_scaled(flat, parts, factors), weight)
    found: list[Tensor | None] = []
    for i, part in enumerate(parts):
        needs = ctx.needs_input_grad[3 + 3 * i : 6 + 3 * i]
        rows = None if x is None else _flat(x)[part.rows]
        to = None if dx is None or weight is None else (dx[part.rows], weight)
        found += share_gradients(part, flat[part.rows], rows, needs, factors[3 * i : 3 * i + 3], kept[2 * i :], to)
    return None, None, None if dx is None else as_dtype(dx, dtype).view(shape), *found


def _scaled(grad: Tensor, parts: Sequence[Share], factors: Sequence[Tensor]) -> Tensor:
    """G with the rows of DoRA parts without dropout times g: what W takes back to dx."""
    scaled = [(part, factors[3 * i + 2]) for i, part in enumerate(parts) if part.scales_base]
    if len(parts) == 1 and scaled and parts[0].rows == slice(0, len(grad)):
        return grad * parts[0].ratio(factors[2], grad.dtype)
    out = grad.clone() if scaled else grad
    for part, magnitude in scaled:
        out[part.rows] *= part.ratio(magnitude, grad.dtype)
    return out


def _matrix(layer: Any, weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(N, K) W in `dtype`."""
    dense = as_dtype(layer.dense_weight() if weight is None else weight, dtype)
    return dense if layer.out_axis == 0 else dense.T


def _part(layer: LoRALayerBase, adapter: LoraAdapter, rows: slice) -> Share:
    seed = layer.route.mask_seed(adapter.name, adapter.layer_key) if adapter.drops else 0
    norm = adapter.constant_norm(layer) if isinstance(adapter, DoraAdapter) else None
    return Share(rows, adapter.scale, adapter.dropout if adapter.drops else 0.0, seed, norm)


def _is_known(adapter: LoraAdapter) -> bool:
    """Whether it is LoRA or DoRA, or a variant that runs exactly as one of them does."""
    kind: Any = type(adapter)
    return _runs_as_we_know(kind) and getattr(adapter, "detach_norm", True)


@functools.cache
def _runs_as_we_know(kind: type) -> bool:
    ours = DoraAdapter if issubclass(kind, DoraAdapter) else LoraAdapter
    return all(getattr(kind, key) is getattr(ours, key) for key in ("output", "add_to", "low_rank", "dropped"))


def _trains_base(layer: LoRALayerBase) -> bool:
    return any(p is not None and p.requires_grad for p in layer._parameters.values())


def _autocast(x: Tensor) -> Tensor:
    """x as autocast would hand it to a linear layer."""
    dtype = autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype == torch.float64 else x.to(dtype)


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
