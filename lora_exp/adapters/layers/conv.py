"""Adapted convolutions of one, two and three dimensions.

Letters: C_in / C_out channels, g groups, k... the kernel's extents, r rank, s... the signal's extents.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_exp.adapters.kernels.conv import Served, fused_convolution
from lora_exp.adapters.kernels.conv_ops import Geometry, PaddingMode
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.registry import adapts

Extents = int | tuple[int, ...]


class _LoRAConv(LoRALayerBase):
    """h = conv(x, W) + b + scale * mix(conv(drop(x), A), B).

    x (batch, C_in, s...), W (C_out, C_in/g, k...), A (r, C_in/g, k...), B (r, C_out/g). A convolves with
    the base's own stride, padding, dilation, padding mode and groups; B mixes each group's r/g channels
    pointwise. So the delta has W's shape, and merging is exact for grouped convolutions too.
    """

    fuses = True
    rank_axis = 0
    own_attributes = (*LoRALayerBase.own_attributes, "geometry")
    groups: int
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding_mode: PaddingMode
    _reversed_padding_repeated_twice: list[int]

    if TYPE_CHECKING:  # the torch layer's own, which knows its geometry

        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Extents,
        stride: Extents = 1,
        padding: Extents | str = 0,
        dilation: Extents = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        rank: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
        )
        super().__init__(*shape, device=device, dtype=dtype)
        self.begin(rank, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def rank_refusal(cls, module: nn.Module, rank: int) -> str | None:
        assert isinstance(module, nn.modules.conv._ConvNd)
        if isinstance(rank, int) and rank % module.groups:
            return (
                f"rank={rank} cannot be shared out among groups={module.groups}; "
                f"use a multiple of {module.groups} (rank_pattern sets it for single layers)"
            )
        return None

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, self.in_channels // self.groups, *self.kernel_size), (
            rank,
            self.out_channels // self.groups,
        )

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))

    def linear_forward(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.weight)

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        z = self._convolve(x, lora_A.to(x.dtype))
        mix = self._pointwise(lora_B.to(x.dtype))
        convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[self._extents - 1]
        return convolve(z, mix, groups=self.groups)

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        return None if self.groups > 1 else (self.dense_weight().flatten(1), lora_A.flatten(1).T, lora_B)

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """(C_out, C_in/g, k...)"""
        by_group_A = lora_A.reshape(self.groups, lora_A.shape[0] // self.groups, -1)
        by_group_B = lora_B.reshape(self.groups, lora_B.shape[0] // self.groups, -1)
        return (by_group_B.mT @ by_group_A).reshape(self.out_channels, *lora_A.shape[1:])

    def along_output(self, values: Tensor) -> Tensor:
        return values.view(-1, *[1] * self._extents)

    def peft_refusal(self) -> str | None:
        if self.groups > 1:
            return f"a convolution with groups={self.groups}, whose A PEFT does not group"
        if any(step != 1 for step in self.dilation):
            return f"a convolution with dilation={tuple(self.dilation)}, which PEFT's A drops"
        if self.padding_mode != "zeros":
            return f"a convolution with padding_mode={self.padding_mode!r}, which PEFT's A drops"
        return None

    def peft_factors(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """(r, C_in, k...), (C_out, r, 1...)"""
        return {"lora_A.weight": lora_A, "lora_B.weight": lora_B.T.view(-1, len(lora_B), *[1] * self._extents)}

    def peft_magnitude(self, magnitude: Tensor) -> Tensor:
        return self.along_output(magnitude)[None]

    def kernel(self, x: Tensor, terms: Served) -> Tensor | None:
        return fused_convolution(self, x, terms)

    @functools.cached_property
    def geometry(self) -> Geometry | None:
        return Geometry.of(self)

    @property
    def _extents(self) -> int:
        return len(self.kernel_size)

    def _pointwise(self, lora_B: Tensor) -> Tensor:
        """(r, C_out/g) -> (C_out, r/g, 1...), the kernel that mixes r channels into C_out by group."""
        by_group = lora_B.reshape(self.groups, -1, lora_B.shape[1])
        return by_group.mT.reshape(self.out_channels, -1, *[1] * self._extents)

    def _convolve(self, x: Tensor, kernel: Tensor) -> Tensor:
        return self._conv_forward(x, kernel, None)


@adapts("torch.nn.modules.conv.Conv1d")
class LoRAConv1d(_LoRAConv, nn.Conv1d):
    __doc__ = _LoRAConv.__doc__  # type: ignore[assignment]
    layer_type = "conv1d"


@adapts("torch.nn.modules.conv.Conv2d")
class LoRAConv2d(_LoRAConv, nn.Conv2d):
    __doc__ = _LoRAConv.__doc__  # type: ignore[assignment]
    layer_type = "conv2d"


@adapts("torch.nn.modules.conv.Conv3d")
class LoRAConv3d(_LoRAConv, nn.Conv3d):
    __doc__ = _LoRAConv.__doc__  # type: ignore[assignment]
    layer_type = "conv3d"
