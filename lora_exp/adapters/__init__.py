"""A LoRA library: adapted layers, models with adapters, PEFT's file format. Needs torch alone."""

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
from lora_exp.adapters.surgery.merging import MergeReport
from lora_exp.adapters.variants.dora import DoraAdapter
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant

__all__ = [
    "BASE",
    "DoRAConv1d",
    "DoRAConv2d",
    "DoRAConv3d",
    "DoRAEmbedding",
    "DoRALinear",
    "DoraAdapter",
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
