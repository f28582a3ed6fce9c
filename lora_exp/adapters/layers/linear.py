"""Adapted nn.Linear.

Letters: r rank, in / out the layer's features, ... any leading dimensions.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.registry import adapts


@adapts("torch.nn.modules.linear.Linear")
class LoRALinear(LoRALayerBase, nn.Linear):
    """h = x Wᵀ + b + scale * (drop(x) A) B.

    x (..., in), W (out, in), A (in, r), B (r, out), h (..., out). W and b are frozen; B starts at zero.
    """

    layer_type = "linear"
    fuses = True

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device=device, dtype=dtype)
        self.begin(rank, lora_alpha, lora_dropout, use_rslora)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (self.in_features, rank), (rank, self.out_features)

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        # Of the (r, in) matrix that PEFT keeps: kaiming_uniform_ takes its fan from the last dimension.
        nn.init.kaiming_uniform_(lora_A.T, a=math.sqrt(5))

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ lora_A.to(x.dtype) @ lora_B.to(x.dtype)

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dense_weight(), lora_A, lora_B

    def linear_forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """(out, in)"""
        return (lora_A @ lora_B).T
