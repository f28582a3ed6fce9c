"""One plain LoRA adapter on one layer (arXiv 2106.09685).

Letters: r rank; A and B have the shapes that the layer's kind states.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.config import check_factors, scaling_factor
from lora_exp.adapters.numerics.dropout import dropout_noise
from lora_exp.adapters.numerics.reference import without_autocast

if TYPE_CHECKING:
    from lora_exp.adapters.layers.adapted import LoRALayerBase


class LoraAdapter(nn.Module):
    """Factors A and B, and how they change a layer's output and weight.

    A variant of LoRA is a subclass in a file of its own that overrides `prepare`, `add_to` and `merged`;
    one that overrides how it runs is never fused.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, name: str, rank: int, alpha: float, dropout: float, use_rslora: bool, layer_key: int = 0
    ) -> None:
        super().__init__()
        check_factors(rank, alpha, dropout)
        self.name = name
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.scale = scaling_factor(rank, alpha, use_rslora)
        self.layer_key = layer_key

    def prepare(self, layer: LoRALayerBase) -> None:
        """Make this adapter's parameters for `layer`, such that its output does not change yet."""
        device, dtype = layer.weight.device, layer.factor_dtype
        shape_A, shape_B = layer.factor_shapes(self.rank)
        # Drawn on the CPU whatever the layer's device, so that a seed gives the same adapter everywhere.
        source = device if device.type == "meta" else torch.device("cpu")
        factors = [torch.zeros(shape, dtype=dtype, device=source) for shape in (shape_A, shape_B)]
        if device.type != "meta":
            layer.initialise(*factors)
        self.lora_A, self.lora_B = (nn.Parameter(factor.to(device)) for factor in factors)

    def base_loaded(self, layer: LoRALayerBase) -> None:
        """Called when other base weights were loaded into `layer`."""

    def output(self, layer: LoRALayerBase, x: Tensor) -> Tensor:
        """The adapted layer's output for x: the plain path that `fused` is compared with."""
        return self.add_to(layer, x, layer.base_forward(x))

    def add_to(self, layer: LoRALayerBase, x: Tensor, base: Tensor) -> Tensor:
        """base + scale * B(A(drop(x))), where base is the frozen layer's output for x."""
        return base + self.low_rank(layer, self.dropped(layer, x))

    def low_rank(self, layer: LoRALayerBase, x: Tensor) -> Tensor:
        """scale * B(A(x)), in the shape of the layer's output; A@B is never formed."""
        return layer.low_rank(x, self.lora_A, self.lora_B) * self.scale

    def dropped(self, layer: LoRALayerBase, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if torch.jit.is_tracing():  # a trace would keep one mask for ever
            return F.dropout(x, self.dropout)
        return x * dropout_noise(x, self.dropout, layer.route.mask_seed(self.name, self.layer_key))

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def delta_weight(self, layer: LoRALayerBase) -> Tensor:
        """scale * AB in the base weight's shape, in the factors' dtype (float32)."""
        with without_autocast(self.lora_A.device.type):
            return layer.combine(self.lora_A, self.lora_B) * self.scale

    def merged(self, layer: LoRALayerBase) -> Tensor:
        """W + delta_weight, accumulated in the factors' dtype."""
        return layer.dense_weight().to(self.lora_A.dtype) + self.delta_weight(layer)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:.6g}, dropout={self.dropout}"
