"""Which base weights an adapter belongs to."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .biases import CHILD, TrainedBiases
from .layer import LoRALayerBase
from .quantized import constants
from .walk import base_modules


def base_sha256(model: nn.Module) -> str | None:
    """SHA-256 over the base's parameters: names, dtypes, shapes and bytes; None on the meta device."""
    digest = hashlib.sha256()
    for module_name, module in base_modules(model):
        for key in module._parameters:
            parameter = _own(module, key)
            if parameter is None:
                continue
            if parameter.is_meta:
                return None
            digest.update(f"{module_name}.{key}:{parameter.dtype}:{tuple(parameter.shape)}".encode())
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
    """The raw bytes, not copied on a CPU."""
    flat = parameter.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
