"""Which base weights an adapter belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .biases import CHILD, TrainedBiases
from .layer import LoRALayerBase
from .packed import constants
from .walk import base_modules


def base_sha256(model: nn.Module) -> str | None:
    """SHA-256 over the base's parameters: names, shapes and values in bfloat16; None on the meta device.

    The same weights have one identity whether they are loaded in float32 or in bfloat16. float16 rounds
    otherwise, and a quantised copy is another base, packed values and constants included.
    """
    digest = hashlib.sha256()
    for module_name, module in base_modules(model):
        for key in module._parameters:
            parameter = _own(module, key)
            if parameter is None:
                continue
            if parameter.is_meta:
                return None
            digest.update(f"{module_name}.{key}:{tuple(parameter.shape)}".encode())
            digest.update(_bytes(parameter))
            for constant in constants(module, parameter):
                digest.update(_bytes(constant))
    return digest.hexdigest()


def _own(module: nn.Module, key: str) -> Tensor | None:
    """The base's parameter, also while an adapter is merged into it."""
    trained = module._modules.get(CHILD)
    kept = module.kept if isinstance(module, LoRALayerBase) else {}
    if isinstance(trained, TrainedBiases):
        kept = {**kept, **trained.kept}
    return kept.get(key, module._parameters[key])


def _bytes(parameter: Tensor) -> Any:
    """The raw bytes of integers (packed values), those in bfloat16 of floats."""
    flat = parameter.detach().to("cpu").contiguous().reshape(-1)
    flat = flat.to(torch.bfloat16) if flat.is_floating_point() else flat
    return flat.view(torch.uint8).numpy().data
