"""A LoRA library: adapted layers, models with adapters, PEFT's file format. Needs torch alone.

Names are imported when first used, so that a look at a config, which needs no layer, does not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_exp.adapters.config import LoraConfig, scaling_factor
    from lora_exp.adapters.files.merged import load_merged
    from lora_exp.adapters.layers.adapted import LoRALayerBase
    from lora_exp.adapters.layers.bitsandbytes import LoRALinear4bit, LoRALinear8bit
    from lora_exp.adapters.layers.conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
    from lora_exp.adapters.layers.dora import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding, DoRALinear
    from lora_exp.adapters.layers.embedding import LoRAEmbedding
    from lora_exp.adapters.layers.linear import LoRALinear
    from lora_exp.adapters.layers.registry import adapts
    from lora_exp.adapters.layers.transformers_conv1d import LoRAConv1D
    from lora_exp.adapters.model import LoraModel
    from lora_exp.adapters.numerics.reference import use_reference
    from lora_exp.adapters.routing.plan import BASE
    from lora_exp.adapters.starts.start import Given
    from lora_exp.adapters.surgery.merging import MergeReport
    from lora_exp.adapters.variants.dora import DoraAdapter
    from lora_exp.adapters.variants.lora import LoraAdapter
    from lora_exp.adapters.variants.registry import variant

_HOMES = {
    "BASE": "routing.plan",
    "DoRAConv1d": "layers.dora",
    "DoRAConv2d": "layers.dora",
    "DoRAConv3d": "layers.dora",
    "DoRAEmbedding": "layers.dora",
    "DoRALinear": "layers.dora",
    "DoraAdapter": "variants.dora",
    "Given": "starts.start",
    "LoRAConv1D": "layers.transformers_conv1d",
    "LoRAConv1d": "layers.conv",
    "LoRAConv2d": "layers.conv",
    "LoRAConv3d": "layers.conv",
    "LoRAEmbedding": "layers.embedding",
    "LoRALayerBase": "layers.adapted",
    "LoRALinear": "layers.linear",
    "LoRALinear4bit": "layers.bitsandbytes",
    "LoRALinear8bit": "layers.bitsandbytes",
    "LoraAdapter": "variants.lora",
    "LoraConfig": "config",
    "LoraModel": "model",
    "MergeReport": "surgery.merging",
    "adapts": "layers.registry",
    "load_merged": "files.merged",
    "scaling_factor": "config",
    "use_reference": "numerics.reference",
    "variant": "variants.registry",
}
__all__ = [
    "BASE",
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAConv3d",
    "DoRAEmbedding",
    "DoRALinear",
    "DoraAdapter",
    "Given",
    "LoRAConv1D",
    "LoRAConv1d",
    "LoRAConv2d",
    "LoRAConv3d",
    "LoRAEmbedding",
    "LoRALayerBase",
    "LoRALinear",
    "LoRALinear4bit",
    "LoRALinear8bit",
    "LoraAdapter",
    "LoraConfig",
    "LoraModel",
    "MergeReport",
    "adapts",
    "load_merged",
    "scaling_factor",
    "use_reference",
    "variant",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found: object = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    return found


def __dir__() -> list[str]:
    return sorted(__all__)
