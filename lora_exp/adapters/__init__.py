"""A LoRA library: adapted layers, models with adapters, PEFT's file format. Needs torch alone."""

from .config import LoraConfig, scaling_factor
from .conv import LoRAConv1d, LoRAConv2d, LoRAConv3d
from .dora import DoraAdapter
from .dora_layers import DoRAConv1d, DoRAConv2d, DoRAConv3d, DoRAEmbedding, DoRALinear
from .embedding import LoRAEmbedding
from .layer import LoRALayerBase
from .linear import LoRALinear
from .lora import LoraAdapter
from .merging import MergeReport
from .model import LoraModel
from .quantized import LoRALinear4bit, LoRALinear8bit
from .registry import adapts
from .routing import BASE
from .switch import use_reference
from .ties import load_merged
from .transposed import LoRAConv1D

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
]
