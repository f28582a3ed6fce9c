"""A LoRA library: adapted layers, models with adapters, PEFT's file format. Needs torch alone."""

from .config import LoraConfig, scaling_factor
from .layer import LoRALayerBase
from .linear import LoRALinear
from .lora import LoraAdapter
from .model import LoraModel
from .registry import adapts

__all__ = [
    "LoRALayerBase",
    "LoRALinear",
    "LoraAdapter",
    "LoraConfig",
    "LoraModel",
    "adapts",
    "scaling_factor",
]
