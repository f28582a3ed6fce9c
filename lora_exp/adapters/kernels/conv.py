"""Adapted convolutions as one step of autograd: x retained once, dropout masks as their seeds.

Letters: N batch, C_out channels, K inputs of one output (C_in/g * k...), P positions of the output (N * t...), r rank,
g groups; kernels W (C_out, C_in/g, k...) and A (r, C_in/g, k...), B (r, C_out/g), V = W + scale * BA, d = x ∘ mask.
LoRA is conv(x, W) + b + c * B conv(d, A) with c = scale / keep; DoRA multiplies the whole product for d with
ratio = magnitude / norm, a constant norm, and with dropout adds to the frozen output as `linear` describes.

Without dropout all of it is one convolution with the kernel ratio ∘ V. Gradients come in two ways:

    narrow   dA and dB from z = conv(d, A), retained, and its gradient: two more convolutions of r channels
    dense    dA, dB and dmagnitude from the whole kernel's gradient, found once: nothing retained beside x

Which way, and whether V is formed, follows from shapes, dtype and device alone, never from a clock. With a frozen A it
is the narrow one, which retains no x; groups have only the dense one, in which dB needs x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from lora_exp.adapters.kernels.conv_ops import Geometry
from lora_exp.adapters.kernels.conv_strategy import Way, by_group, is_exact, shortest
from lora_exp.adapters.kernels.terms import Factors, Share, Terms, as_dtype
from lora_exp.adapters.numerics.autocast import autocast_dtype, autocast_input, without_autocast
from lora_exp.adapters.numerics.first_derivative import first_derivative_only, no_forward_mode
from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction

_INSTEAD = "run forward inside lora_exp.adapters.use_reference()"
Served = Sequence[tuple[Terms | None, slice | None]]  # each with its slice of the batch; None is all of it


class ConvolutionHost(Protocol):
    """A frozen convolution."""

    weight: Tensor
    bias: Tensor | None
    groups: int

    @property
    def geometry(self) -> Geometry | None: ...

    def base_forward(self, x: Tensor) -> Tensor: ...


def fused_convolution(host: ConvolutionHost, x: Tensor, served: Served) -> Tensor | None:
    """The adapted layer's output for x (N, C_in, s...), or None where only the plain path will do: padding with other
    values than zeros, no batch dimension, groups in 16 bit or off the CPU."""
    if (geometry := host.geometry) is None:
        return None
    x = autocast_input(x)
    if x.dim() != host.weight.dim() or not x.numel() or not _fits(host, x):
        return None
    outs = [_output(host, geometry, terms, x if rows is None else x[rows]) for terms, rows in served]
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _fits(host: ConvolutionHost, x: Tensor) -> bool:
    """Whether the dtypes agree (else the plain path raises torch's own error) and groups can be merged."""
    agrees = x.dtype in (host.weight.dtype, autocast_dtype(x.device.type))
    return agrees and (host.groups == 1 or is_exact(x, host.weight))


def _output(host: ConvolutionHost, geometry: Geometry, terms: Terms | None, x: Tensor) -> Tensor:
    if terms is None:
        return host.base_forward(x)
    share = Share(None, terms)
    kind = terms.norm is not None, share.p > 0, is_exact(x, host.weight)
    rank = terms.B.shape[0]
    shapes = host.weight.shape, x.shape
    way = Way(geometry, share, *shortest(geometry, rank, *kind, *shapes, terms.A.requires_grad))
    return _Convolved.apply(way, x, host.weight, host.bias, *terms.factors)


class _Context(Context, Protocol):
    way: Way
    like: tuple[torch.Size, torch.dtype]


class _Convolved(TensorFunction):
    """(way, x (N, C_in, s...), W, bias (C_out,) or None, A, B, magnitude (C_out,) or None) -> (N, C_out, t...)"""

    @staticmethod
    def forward(
        ctx: _Context,
        way: Way,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        magnitude: Tensor | None,
    ) -> Tensor:
        factors = A, B, magnitude
        with without_autocast(x.device.type):
            bias = None if bias is None else as_dtype(bias, x.dtype)
            out, z, product = (_dense if way.dense else _narrow)(way, x, as_dtype(weight, x.dtype), bias, *factors)
        needs = ctx.needs_input_grad[4:]
        keeps_x = any(needs) if way.dense else needs[0]
        ctx.way, ctx.like = way, (x.shape, x.dtype)
        kept = x if keeps_x else None, z if needs[1] else None, product if needs[2] else None
        ctx.save_for_backward(weight, *factors, *kept)
        return out

    jvp = staticmethod(no_forward_mode(_INSTEAD))

    @staticmethod
    @first_derivative_only(_INSTEAD)
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, A, B, magnitude, x, *kept = ctx.saved_tensors
        shape, dtype = ctx.like
        grad = as_dtype(grads[0], dtype)
        x = grad.new_empty(1).expand(shape) if x is None else x  # its shape is needed all the same
        needs = (ctx.needs_input_grad[1], *ctx.needs_input_grad[4:])
        gradients = _dense_gradients if ctx.way.dense else _narrow_gradients
        with without_autocast(grad.device.type):
            dx, *found = gradients(ctx.way, needs, grad, x, as_dtype(weight, dtype), (A, B, magnitude), kept)
        return None, dx, None, None, *found


def _dense(
    way: Way, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor, None, None]:
    own, change = way.kernels(weight, A, B, magnitude)
    out = way.geometry.output(x, own, bias)
    if change is not None:
        out += way.geometry.output(_dropped(x, way.share.mask(x)), change)
    return out, None, None


def _dense_gradients(
    way: Way, needs: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, kept: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    own, change = way.kernels(weight, *factors)
    mask, trains = way.share.mask(x), any(needs[1:])
    dx, dkernel = way.geometry.gradients(grad, x, own, needs[0], trains and mask is None)
    if mask is not None:
        assert change is not None
        low, dkernel = way.geometry.gradients(grad, _dropped(x, mask), change, needs[0], trains)
        if dx is not None:
            assert low is not None
            dx.addcmul_(low, mask)
    if dkernel is None:
        return dx, None, None, None
    return dx, *_factor_gradients(way, needs[1:], dkernel.flatten(1).mul_(way.share.boost), weight, *factors)


def _factor_gradients(
    way: Way, needs: Sequence[bool], change: Tensor, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor | None, ...]:
    """dA, dB, dmagnitude for ∂loss/∂(ratio ∘ V) = change (C_out, K)"""
    groups, dm = way.geometry.groups, None
    if magnitude is not None:
        if needs[2]:
            dm = (change * way.merged(weight, A, B).flatten(1)).sum(1).div_(way.share.norm)
        change *= (magnitude / way.share.norm).unsqueeze(1)
    change = by_group(change.mul_(way.share.scale), groups)
    dA = (by_group(B, groups) @ change).view(A.shape) if needs[0] else None
    dB = (by_group(A, groups) @ change.mT).view(B.shape) if needs[1] else None
    return dA, dB, dm


def _narrow(
    way: Way, x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, magnitude: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, z (N, r, t...) and, for DoRA, what ratio multiplies (N, C_out, t...)."""
    share, convolve = way.share, way.geometry.output
    mask = share.mask(x)
    # Over the mask where that keeps x's memory format: a tensor less.
    d = mask.mul_(x) if mask is not None and x.is_contiguous() else _dropped(x, mask)
    z = convolve(d, as_dtype(A, x.dtype))
    kernel = way.merged(weight, A, B) if way.merges else weight
    if magnitude is None:
        out = convolve(x, kernel, bias)
        return out if way.merges else _mix(out, z, B, share.factor), z, None
    product = convolve(d, kernel)
    if share.p:
        out = convolve(x, weight, bias).addcmul_(product, way.ratio(magnitude, x, less=1), value=share.boost)
        _mix(out, z, B * (magnitude / share.norm), share.factor)
    if not way.merges:
        _mix(product, z, B, share.scale)
    if not share.p:
        ratio = way.ratio(magnitude, x)
        out = product * ratio if bias is None else torch.addcmul(bias.view(ratio.shape), product, ratio)
    return out, z, product


def _narrow_gradients(
    way: Way, needs: Sequence[bool], grad: Tensor, x: Tensor, weight: Tensor, factors: Factors, kept: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    (A, B, magnitude), (z, product), share, flat = factors, kept, way.share, grad.flatten(2)
    weights = share.factor if magnitude is None else (magnitude / share.norm).mul_(share.factor)
    dx = dA = dB = dm = None
    if needs[2]:
        found = torch.addbmm(flat.new_empty(B.shape), z.flatten(2), flat.mT, beta=0)
        dB = as_dtype(found, B.dtype).mul_(weights)
    if needs[3] and magnitude is not None:
        dm = (grad * product).flatten(2).sum((0, 2), dtype=magnitude.dtype).mul_(share.boost / share.norm)
    if needs[0] or needs[1]:
        into = as_dtype(B * weights, grad.dtype).expand(len(grad), -1, -1)
        dz = torch.bmm(into, flat).view(len(grad), -1, *grad.shape[2:])
        mask = share.mask(x)
        low, dA = way.geometry.gradients(
            dz, _dropped(x, mask), as_dtype(A, dz.dtype), needs[0] and not way.merges_back, needs[1]
        )
        dA = None if dA is None else as_dtype(dA, A.dtype)
        dx = _to_input(way, grad, x, mask, low, way.kernels(weight, *factors)) if needs[0] else None
    return dx, dA, dB, dm


def _to_input(
    way: Way, grad: Tensor, x: Tensor, mask: Tensor | None, low: Tensor | None, kernels: tuple[Tensor, Tensor | None]
) -> Tensor | None:
    """dx (N, C_in, s...), to which `low` came through A alone"""
    dx, change = (None if k is None else way.geometry.gradients(grad, x, k, True, False)[0] for k in kernels)
    if change is not None:
        low = change if low is None else low.add_(change)
    if dx is None or low is None:
        return dx
    return dx.add_(low) if mask is None else dx.addcmul_(low, mask)


def _mix(out: Tensor, z: Tensor, B: Tensor, scale: float) -> Tensor:
    """out (N, C_out, t...) += scale * B z, in place; z (N, r, t...), B (r, C_out)"""
    flat = out.view(*out.shape[:2], -1)
    flat.baddbmm_(as_dtype(B, z.dtype).T.expand(len(z), -1, -1), z.flatten(2), alpha=scale)
    return out


def _dropped(x: Tensor, mask: Tensor | None) -> Tensor:
    """d"""
    return x if mask is None else x * mask
