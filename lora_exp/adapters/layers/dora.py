"""Layers that start with a DoRA adapter. A layer of any kind holds LoRA and DoRA adapters alike; these
only spare a user who builds a network by hand the choice."""

from __future__ import annotations

from typing import Any

from torch import nn

from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from lora_exp.adapters.layers.embedding import LoRAEmbedding
from lora_exp.adapters.layers.linear import LoRALinear
from lora_exp.adapters.variants.dora import DoraAdapter
from lora_exp.errors import UserError


class _StartsWithDora(LoRALayerBase):
    first_variant = DoraAdapter

    @property
    def magnitude(self) -> nn.Parameter:
        return self.adapter.get_parameter("magnitude")


class DoRALinear(_StartsWithDora, LoRALinear):
    """h = x W'ᵀ + b, W' = m * (W + delta) / ||W + delta|| by row; m (out,), shapes else as LoRALinear."""

    def __init__(
        self, in_features: int, out_features: int, rank: int = 8, alpha: float | None = None, **options: Any
    ) -> None:
        """`alpha` and `lora_alpha` are two names of one number, 8 unless one of them is given."""
        if alpha is not None and options.setdefault("lora_alpha", alpha) != alpha:
            raise UserError(
                f"alpha={alpha} and lora_alpha={options['lora_alpha']} are two names of one number: give one of them"
            )
        super().__init__(in_features, out_features, rank=rank, **options)


class DoRAEmbedding(_StartsWithDora, LoRAEmbedding):
    """e = W'[i], W' = m * (W + delta) / ||W + delta|| by column; m (d,), shapes else as LoRAEmbedding."""


class DoRAConv1d(_StartsWithDora, LoRAConv1d):
    """conv(x, W') + b, normalised by output channel; m (C_out,), shapes else as LoRAConv1d."""


class DoRAConv2d(_StartsWithDora, LoRAConv2d):
    """conv(x, W') + b, normalised by output channel; m (C_out,), shapes else as LoRAConv2d."""


class DoRAConv3d(_StartsWithDora, LoRAConv3d):
    """conv(x, W') + b, normalised by output channel; m (C_out,), shapes else as LoRAConv3d."""
