"""One DoRA adapter on one layer: weight-decomposed low-rank adaptation (arXiv 2402.09353).

W' = m * (W + delta) / ||W + delta||, one magnitude m and one norm for each output feature of W.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_exp.adapters.numerics.reference import fused_allowed
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.weight_norm import NormCache

if TYPE_CHECKING:
    from lora_exp.adapters.layers.adapted import LoRALayerBase


class DoraAdapter(LoraAdapter):
    """`magnitude` (out,) starts as the norm of the loaded weight, so that nothing changes at first."""

    magnitude: nn.Parameter

    def __init__(
        self,
        name: str,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        layer_key: int = 0,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(name, rank, alpha, dropout, use_rslora, layer_key)
        self.detach_norm = detach_norm
        self._norms = NormCache()

    def prepare(self, layer: LoRALayerBase) -> None:
        super().prepare(layer)
        with torch.no_grad():
            self.magnitude = nn.Parameter(self.constant_norm(layer).clone())

    def base_loaded(self, layer: LoRALayerBase) -> None:
        # An untrained adapter keeps meaning "no change" when other base weights come in.
        if not self.lora_A.is_meta and not (self.lora_A.any() and self.lora_B.any()):
            with torch.no_grad():
                self.magnitude.copy_(self.constant_norm(layer))

    def add_to(self, layer: LoRALayerBase, x: Tensor, base: Tensor) -> Tensor:
        ratio = self.ratio(layer)
        if self.drops:
            # The whole product sees the dropped input, as in PEFT; base keeps only its share of one.
            x = self.dropped(layer, x)
            plain = layer.linear_forward(x)
        else:
            bias = getattr(layer, "bias", None)
            plain = base if bias is None else base - layer.along_output(bias)
        change = layer.along_output((ratio - 1).to(base.dtype)) * plain
        return base + change + layer.along_output(ratio.to(base.dtype)) * self.low_rank(layer, x)

    def merged(self, layer: LoRALayerBase) -> Tensor:
        ratio = self.magnitude / self.weight_norm(layer)
        return super().merged(layer) * layer.along_weight(ratio)

    def ratio(self, layer: LoRALayerBase) -> Tensor:
        """(out,) m / ||W + delta||; the norm is a constant to the gradient (§4.3) unless asked otherwise."""
        if not self.detach_norm:
            return self.magnitude / self.weight_norm(layer)
        return self.magnitude / self.constant_norm(layer)

    def constant_norm(self, layer: LoRALayerBase) -> Tensor:
        """(out,) the norm without a gradient, kept as long as what it follows from."""
        can_factor = layer.matrices(self.lora_A, self.lora_B) is not None and not self.lora_A.is_meta
        if can_factor and fused_allowed():
            return self._norms.norm(layer, self)
        with torch.no_grad():
            return self.weight_norm(layer)

    def weight_norm(self, layer: LoRALayerBase) -> Tensor:
        """(out,) ||W + delta||, in the factors' dtype (float32); never zero, as a dead row has m = 0."""
        weight = LoraAdapter.merged(self, layer)
        others = [axis for axis in range(weight.dim()) if axis != layer.out_axis]
        norm = torch.linalg.vector_norm(weight, dim=others)
        return norm.clamp_min(torch.finfo(norm.dtype).tiny)
