"""Adapted convolutions as one step of autograd: x retained once, dropout masks as their seeds.

Letters: N batch, C_out channels, K inputs of one output (C_in/g * k...), P positions of the output (N * t...), r rank,
g groups; kernels W (C_out, C_in/g, k...) and A (r, C_in/g, k...), B (r, C_out/g), V = W + scale * BA, d = x ∘ mask.
LoRA is conv(x, W) + b + c * B conv(d, A) with c = scale / keep; DoRA multiplies the whole product for d with
ratio = magnitude / norm, a constant norm, and with dropout adds to the frozen output as `fused` describes.

Without dropout all of it is one convolution with the kernel ratio ∘ V. Gradients come in two ways:

    narrow   dA and dB from z = conv(d, A), retained, and its gradient: two more convolutions of r channels
    dense    dA, dB and dmagnitude from the whole kernel's gradient, found once: nothing retained beside x

Which way, and whether V is formed, follows from shapes, dtype and device alone, never from a clock.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .convolutions import Geometry
from .dora import DoraAdapter
from .fused import _autocast, _is_known, _trains_base
from .lora import LoraAdapter
from .once import first_derivative_only
from .shares import Share, as_dtype
from .switch import fused_allowed, is_plain, without_autocast

if TYPE_CHECKING:
    from .layer import LoRALayerBase
    from .routing import Plan

_NARROWEST = 16  # a kernel of fewer output channels takes as long: they fill one vector register
_PASS = 30  # reading and writing an output's element once takes as long as so many of its multiplications


def fused_convolution(layer: Any, x: Tensor, plan: Plan) -> Tensor | None:
    """The adapted layer's output for x (N, C_in, s...), or None where only the plain path will do: a trained base,
    an unknown variant, padding with other values than zeros, no batch dimension, groups in 16 bit or off the CPU."""
    if layer.geometry is None or not (fused_allowed() and is_plain(x)) or _trains_base(layer):
        return None
    x, spans = _autocast(x), _spans(layer, x, plan)
    if x.dim() != layer.weight.dim() or not x.numel() or not all(a is None or _is_known(a) for a, _ in spans):
        return None
    if not _fits(layer, x) or all(adapter is None for adapter, _ in spans):
        return None
    pieces = x.split([size for _, size in spans]) if len(spans) > 1 else [x]
    outs = [
        layer.base_forward(piece) if adapter is None else _adapted(layer, adapter, piece)
        for (adapter, _), piece in zip(spans, pieces, strict=True)
    ]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _fits(layer: Any, x: Tensor) -> bool:
    """Whether the dtypes agree (else the plain path raises torch's own error) and groups can be merged."""
    same = x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type)
    return same and (layer.groups == 1 or _is_exact(x))


def _is_exact(x: Tensor) -> bool:
    """Whether W + scale * BA keeps a small update; not so in 16 bit, nor in the TF32 of GPUs."""
    return x.dtype.itemsize >= 4 and x.device.type in ("cpu", "meta")


def _spans(layer: LoRALayerBase, x: Tensor, plan: Plan) -> list[tuple[LoraAdapter | None, int]]:
    """Each adapter (None: the base alone) with the number of samples it serves."""
    if plan.sizes is None:
        return [(layer._adapter(plan.names[0]), x.shape[0])]
    if x.shape[0] == 1 < sum(plan.sizes):
        return []
    return [(layer._adapter(name), stop - start) for name, start, stop in plan.split(x.shape[0])]


def _adapted(layer: Any, adapter: LoraAdapter, x: Tensor) -> Tensor:
    seed = layer.route.mask_seed(adapter.name, adapter.layer_key) if adapter.drops else 0
    norm = adapter.constant_norm(layer) if isinstance(adapter, DoraAdapter) else None
    share = Share(slice(None), adapter.scale, adapter.dropout if adapter.drops else 0.0, seed, norm)
    kind = norm is not None, adapter.drops, _is_exact(x)
    way = _Way(layer.geometry, share, *_choice(layer.geometry, adapter.rank, *kind, layer.weight.shape, x.shape))
    factors = [adapter._parameters.get(key) for key in ("lora_A", "lora_B", "magnitude")]
    out: Tensor = _Convolved.apply(way, x, layer.weight, layer.bias, *factors)
    return out


@functools.lru_cache(maxsize=4096)
def _choice(
    geometry: Geometry, r: int, is_dora: bool, drops: bool, exact: bool, weight: torch.Size, x: torch.Size
) -> tuple[bool, bool]:
    """merges, dense; by the multiplications that each way takes."""
    C_out, K, P = weight[0], math.prod(weight[1:]), geometry.positions(x)
    narrow = 2 * P * (max(r, _NARROWEST) * K + (r + 2 * _PASS * is_dora) * C_out)
    dense = (P + 4 * r) * C_out * K
    may_merge = exact and (is_dora or not drops)
    if geometry.groups > 1 or (may_merge and dense <= narrow):
        return True, True
    return may_merge and 2 * C_out * K <= P * (C_out + K), False


@dataclasses.dataclass(frozen=True, slots=True)
class _Way:
    """merges: BA is added to W before W meets x; dense: gradients of the factors come from the kernel's."""

    geometry: Geometry
    share: Share
    merges: bool
    dense: bool

    def ratio(self, magnitude: Tensor, like: Tensor, less: float = 0.0) -> Tensor:
        """(C_out,) -> (C_out, 1, ...): ratio - `less`, to multiply an output's channels or a kernel's rows with."""
        return as_dtype(magnitude / self.share.norm - less, like.dtype).view(-1, *[1] * len(self.geometry.kernel))

    def merged(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """V, or W if nothing is merged; (C_out, C_in/g, k...)"""
        if not self.merges:
            return weight
        ours = _by_group(B, self.geometry.groups).mT, _by_group(A, self.geometry.groups)
        return torch.baddbmm(_by_group(weight, self.geometry.groups), *ours, alpha=self.share.scale).view(weight.shape)

    def kernels(self, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What x, and with dropout what d is convolved with; without a merge low-rank terms come on top."""
        kernel = self.merged(weight, A, B)
        if magnitude is not None:
            ratio = magnitude / self.share.norm
            kernel = (kernel.flatten(1) * as_dtype(ratio, kernel.dtype).unsqueeze(1)).view(kernel.shape)
        if not self.share.p:
            return kernel, None
        return weight, None if kernel is weight else (kernel - weight).mul_(self.share.boost)


class _Convolved(torch.autograd.Function):
    """(way, x (N, C_in, s...), W, bias (C_out,) or None, A, B, magnitude (C_out,) or None) -> (N, C_out, t...)"""

    @staticmethod
    def forward(ctx: Any, way: _Way, x: Tensor, weight: Tensor, bias: Any, *factors: Any) -> Tensor:
        with without_autocast(x.device.type):
            bias = None if bias is None else as_dtype(bias, x.dtype)
            out, z, product = (_dense if way.dense else _narrow)(way, x, as_dtype(weight, x.dtype), bias, *factors)
        needs = ctx.needs_input_grad[4:]
        keeps_x = any(needs) if way.dense else needs[0]
        ctx.way, ctx.like = way, (x.shape, x.dtype)
        kept = x if keeps_x else None, z if needs[1] else None, product if needs[2] else None
        ctx.save_for_backward(*kept, weight, *factors)
        return out

    @staticmethod
    @first_derivative_only("run forward inside lora_exp.adapters.use_reference()")
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x, z, product, weight, *factors = ctx.saved_tensors
        shape, dtype = ctx.like
        x = grad.new_empty(1, dtype=dtype).expand(shape) if x is None else x
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        with without_autocast(grad.device.type):
            signals = as_dtype(grad, dtype), x, as_dtype(weight, dtype)
            if ctx.way.dense:
                dx, *found = _dense_gradients(ctx.way, needs, *signals, *factors)
            else:
                dx, *found = _narrow_gradients(ctx.way, needs, *signals, *factors, z, product)
        return None, dx, None, None, *found


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """d, written over the mask where that keeps x's memory format."""
    if mask is None:
        return x
    return mask.mul_(x) if x.is_contiguous() else x * mask


def _dense(way: _Way, x: Tensor, weight: Tensor, bias: Any, *factors: Any) -> tuple[Tensor, None, None]:
    own, dropped = way.kernels(weight, *factors)
    out = way.geometry.output(x, own, bias)
    if dropped is not None:
        out += way.geometry.output(_dropped(x, way.share.mask(x)), dropped)
    return out, None, None


def _dense_gradients(
    way: _Way, needs: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Any
) -> tuple[Tensor | None, ...]:
    own, dropped = way.kernels(weight, A, B, magnitude) if needs[0] else (weight, None)
    mask = way.share.mask(x)
    dx = way.geometry.to_signal(grad, x, own) if needs[0] else None
    if dx is not None and dropped is not None:
        dx.addcmul_(way.geometry.to_signal(grad, x, dropped), mask)
    if not any(needs[1:]):
        return dx, None, None, None
    change = way.geometry.to_kernel(grad, _dropped(x, mask), weight).flatten(1).mul_(way.share.boost)
    dm = None
    if magnitude is not None:
        dm = (change * way.merged(weight, A, B).flatten(1)).sum(1).div_(way.share.norm) if needs[3] else None
        change *= (magnitude / way.share.norm).unsqueeze(1)
    change = _by_group(change.mul_(way.share.scale), way.geometry.groups)
    groups = way.geometry.groups
    dA = (_by_group(B, groups) @ change).view(A.shape) if needs[1] else None
    dB = (_by_group(A, groups) @ change.mT).view(B.shape) if needs[2] else None
    return dx, dA, dB, dm


def _narrow(
    way: _Way, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, z (N, r, t...) and, for DoRA, what ratio multiplies (N, C_out, t...)."""
    share, convolve = way.share, way.geometry.output
    d = _dropped(x, share.mask(x))
    z = convolve(d, as_dtype(A, x.dtype))
    kernel = way.merged(weight, A, B)
    if magnitude is None:
        out = convolve(x, kernel, bias)
        return out if way.merges else _mix(out, z, B, share.factor), z, None
    product = convolve(d, kernel)
    if not way.merges:
        _mix(product, z, B, share.scale)
    if not share.p:
        ratio = way.ratio(magnitude, x)
        out = product * ratio if bias is None else torch.addcmul(bias.view(ratio.shape), product, ratio)
    else:  # ratio * product - conv(d, W) = (ratio - 1) * product + the low-rank term
        out = convolve(x, weight, bias).addcmul_(product, way.ratio(magnitude, x, 1), value=share.boost)
        _mix(out, z, B, share.factor)
    return out, z, product


def _mix(out: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """out (N, C_out, t...) += scale * B z, in place; z (N, r, t...), B (r, C_out)"""
    flat = out.view(*out.shape[:2], -1)
    flat.baddbmm_(as_dtype(B, z.dtype).T.expand(len(z), -1, -1), z.flatten(2), alpha=scale)
    return out


def _narrow_gradients(
    way: _Way,
    needs: Sequence[bool],
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Any,
    z: Tensor,
    product: Tensor,
) -> tuple[Tensor | None, ...]:
    share, flat = way.share, grad.flatten(2)
    weights = torch.full_like(B[:1], share.factor) if magnitude is None else (magnitude / share.norm) * share.factor
    dx = dA = dB = dm = None
    if needs[2]:
        into = flat.new_empty(B.shape)
        dB = as_dtype(torch.addbmm(into, z.flatten(2), flat.mT, beta=0), B.dtype) * weights
    if needs[3]:
        dm = (grad * product).flatten(2).sum((0, 2), dtype=magnitude.dtype).mul_(share.boost / share.norm)
    if needs[0] or needs[1]:
        dz = (as_dtype(B * weights, grad.dtype) @ flat).view(len(grad), -1, *grad.shape[2:])
        mask = share.mask(x)
        if needs[0]:
            dx = _to_input(way, grad, dz, x, mask, weight, A, B, magnitude)
        if needs[1]:
            dA = as_dtype(way.geometry.to_kernel(dz, _dropped(x, mask), as_dtype(A, dz.dtype)), A.dtype)
    return dx, dA, dB, dm


def _to_input(
    way: _Way, grad: Tensor, dz: Tensor, x: Tensor, mask: Tensor | None, weight: Tensor, A: Tensor, *others: Any
) -> Tensor:
    """dx (N, C_in, s...)"""
    own, dropped = way.kernels(weight, A, *others)
    dx = way.geometry.to_signal(grad, x, own)
    low = None if way.merges else way.geometry.to_signal(dz, x, as_dtype(A, dz.dtype))
    if dropped is not None:
        change = way.geometry.to_signal(grad, x, dropped)
        low = change if low is None else change.add_(low)
    if low is None:
        return dx
    return dx.add_(low) if mask is None else dx.addcmul_(low, mask)


def _by_group(kernel: Tensor, groups: int) -> Tensor:
    """(channels, ...) -> (g, channels/g, ...)"""
    return kernel.reshape(groups, kernel.shape[0] // groups, -1)
