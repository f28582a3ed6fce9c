"""Adapted Conv1D of transformers (GPT-2): a linear layer that keeps its weight as (in, out).

Recognised by name; transformers itself is never imported here.
"""

from __future__ import annotations

import math
import sys

from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.registry import adapted_class, adapts
from lora_exp.errors import UserError

_BASE = "transformers.pytorch_utils.Conv1D"


@adapts(_BASE)
class LoRAConv1D(LoRALayerBase):
    """h = x W + b + scale * (drop(x) A) B.

    x (..., in), W (in, out), A (in, r), B (r, out). Every instance is a transformers Conv1D as well.
    """

    layer_type = "linear"
    fuses = True
    out_axis = 1

    def __new__(cls, *args: object, **kwargs: object) -> LoRAConv1D:
        if cls is not LoRAConv1D:
            return super().__new__(cls)
        if (loaded := sys.modules.get("transformers.pytorch_utils")) is None:
            raise UserError("LoRAConv1D adapts transformers' Conv1D; import transformers first")
        return super().__new__(adapted_class(cls, loaded.Conv1D))

    def __init__(
        self,
        nf: int,
        nx: int,
        rank: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
    ) -> None:
        super().__init__(nf, nx)
        self.begin(rank, lora_alpha, lora_dropout, use_rslora)

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = self.weight.shape
        return (inputs, rank), (rank, outputs)

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A.T, a=math.sqrt(5))

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return x @ lora_A.to(x.dtype) @ lora_B.to(x.dtype)

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.dense_weight().T, lora_A, lora_B

    def linear_forward(self, x: Tensor) -> Tensor:
        return x @ self.weight

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """(in, out)"""
        return lora_A @ lora_B
