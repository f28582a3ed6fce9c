"""One convolution and its two gradients, for kernels of any number of output channels.

Letters: N batch, C_in / C_out channels, g groups, s... / t... the signal's extents before / after.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal, Protocol

import torch
from torch import Tensor

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Convolution(Protocol):
    """torch's _ConvNd."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode
    _reversed_padding_repeated_twice: list[int]


@dataclasses.dataclass(frozen=True, slots=True)
class Geometry:
    """How a layer's kernels pass over a signal; zeros around it, as many before as after."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(cls, layer: Convolution) -> Geometry | None:
        """None for a padding that a convolution alone cannot do."""
        around = layer._reversed_padding_repeated_twice  # (last before, last after, ..., first before, first after)
        if layer.padding_mode != "zeros" or around[::2] != around[1::2]:
            return None
        stride, padding, dilation = map(tuple, (layer.stride, around[::-2], layer.dilation))  # some layers hold lists
        return cls(tuple(layer.kernel_size), stride, padding, dilation, layer.groups)

    def positions(self, x: torch.Size) -> int:
        """N * t... for x of shape (N, C_in, s...)"""
        axes = zip(x[2:], self.kernel, self.stride, self.padding, self.dilation, strict=True)
        return x[0] * math.prod((s + 2 * p - d * (k - 1) - 1) // stride + 1 for s, k, stride, p, d in axes)

    def output(self, x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        """(N, C_in, s...), (C_out, C_in/g, k...) -> (N, C_out, t...)"""
        none = [0] * len(self.kernel)
        return torch.convolution(x, kernel, bias, self.stride, self.padding, self.dilation, False, none, self.groups)

    def gradients(
        self, grad: Tensor, x: Tensor, kernel: Tensor, to_x: bool, to_kernel: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx (N, C_in, s...) and dkernel (C_out, C_in/g, k...), as asked, for ∂loss/∂output = grad (N, C_out, t...)."""
        if self._is_pointwise and x.device.type in ("cpu", "meta") and grad.is_contiguous() and x.is_contiguous():
            return _product_gradients(grad, x, kernel, to_x, to_kernel)
        none = [0] * len(self.kernel)
        place = self.stride, self.padding, self.dilation, False, none, self.groups
        dx, dkernel, _ = torch.ops.aten.convolution_backward(grad, x, kernel, None, *place, [to_x, to_kernel, False])
        return dx, dkernel

    @property
    def _is_pointwise(self) -> bool:
        return self.groups == 1 and {*self.kernel, *self.stride} == {1} and not any(self.padding)


def _product_gradients(
    grad: Tensor, x: Tensor, kernel: Tensor, to_x: bool, to_kernel: bool
) -> tuple[Tensor | None, Tensor | None]:
    """A pointwise convolution is a product of matrices, up to a third faster backwards than as a convolution."""
    flat, ours, dx, dkernel = grad.flatten(2), kernel.flatten(1), None, None
    if to_x:
        dx = torch.bmm(ours.T.expand(len(x), -1, -1), flat).view(x.shape)
    if to_kernel:
        dkernel = torch.addbmm(ours, flat, x.flatten(2).mT, beta=0).view(kernel.shape)
    return dx, dkernel
