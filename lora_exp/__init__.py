"""LoRA from scratch, and a Hydra-configured experiment harness around it.

The library's names are imported from ``lora_exp.adapters`` when first used, so that importing the package
(which ``python -m lora_exp --help`` does) costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lora_exp.adapters import (
        DoRAConv2d,
        DoRAEmbedding,
        DoRALinear,
        LoraConfig,
        LoRAConv2d,
        LoRAEmbedding,
        LoRALinear,
        LoraModel,
    )

__version__ = "0.1.0"
__all__ = [
    "DoRAConv2d",
    "DoRAEmbedding",
    "DoRALinear",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoraConfig",
    "LoraModel",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        found: object = getattr(importlib.import_module("lora_exp.adapters"), name)
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
