"""How one adapter's convolution is computed: the kernels that it takes, and which way is the shortest.

Letters: N batch, C_out channels, K inputs of one output (C_in/g * k...), P positions of the output (N * t...), r rank,
g groups; kernels W (C_out, C_in/g, k...) and A (r, C_in/g, k...), B (r, C_out/g), V = W + scale * BA.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import torch
from torch import Tensor

from lora_exp.adapters.kernels.conv_ops import Geometry
from lora_exp.adapters.kernels.terms import Share, as_dtype

_NARROWEST = 16  # a kernel of fewer output channels takes as long: they fill one vector register
_PASS = 30  # reading and writing an output's element once takes as long as so many of its multiplications


def is_exact(x: Tensor, weight: Tensor) -> bool:
    """Whether W + scale * BA keeps a small update; not so in 16 bit, nor in the TF32 of GPUs."""
    return x.dtype == weight.dtype and x.dtype.itemsize >= 4 and x.device.type in ("cpu", "meta")


@functools.lru_cache(maxsize=4096)
def shortest(
    geometry: Geometry,
    r: int,
    is_dora: bool,
    drops: bool,
    exact: bool,
    weight: torch.Size,
    x: torch.Size,
    trains_A: bool = True,
) -> tuple[bool, bool, bool]:
    """The last three fields of the Way that takes the fewest multiplications, x not being retained for a frozen A."""
    C_out, K, P = weight[0], math.prod(weight[1:]), geometry.positions(x)
    narrow = 2 * P * (max(r, _NARROWEST) * K + (r + 2 * _PASS * is_dora) * C_out)
    dense = (P + r) * C_out * K
    may_merge = exact and (is_dora or not drops)
    if geometry.groups > 1 or (may_merge and trains_A and dense <= narrow):
        return True, True, True
    return may_merge and not drops and K <= P, may_merge and C_out <= P, False


@dataclasses.dataclass(slots=True)
class Way:
    """Whether V is formed for the output (if dense or without dropout), and for the gradient of x (so, or for DoRA);
    whether the factors' gradients are found densely."""

    geometry: Geometry
    share: Share
    merges: bool
    merges_back: bool
    dense: bool

    def ratio(self, magnitude: Tensor, like: Tensor, less: float = 0.0) -> Tensor:
        """(C_out,) -> (C_out, 1...): ratio - `less`, which multiplies an output's channels or a kernel's rows."""
        return as_dtype(magnitude / self.share.norm - less, like.dtype).view(-1, *[1] * len(self.geometry.kernel))

    def merged(self, weight: Tensor, A: Tensor, B: Tensor) -> Tensor:
        """V (C_out, C_in/g, k...)"""
        base, *ours = (by_group(kernel, self.geometry.groups) for kernel in (weight, B, A))
        return torch.baddbmm(base, ours[0].mT, ours[1], alpha=self.share.scale).view(weight.shape)

    def kernels(self, weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What x, and with dropout what d is convolved with; without a merge low-rank terms come on top."""
        kernel = self.merged(weight, A, B) if self.merges_back else weight
        ratio = None if magnitude is None else self.ratio(magnitude, kernel).unsqueeze(1)
        if not self.share.p:
            return kernel if ratio is None else kernel * ratio, None
        if self.merges_back:
            return weight, (kernel if ratio is None else kernel * ratio).sub_(weight).mul_(self.share.boost)
        if magnitude is None:
            return weight, None
        # In 16 bit a difference of rounded kernels would be noise.
        return weight, (weight * self.ratio(magnitude, weight, less=1).unsqueeze(1)).mul_(self.share.boost)


def by_group(kernel: Tensor, groups: int) -> Tensor:
    """(channels, ...) -> (g, channels/g, ...)"""
    return kernel.reshape(groups, kernel.shape[0] // groups, -1)
