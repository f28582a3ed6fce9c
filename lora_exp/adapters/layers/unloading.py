"""Adapted layers turned back into layers of the class they came from."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import nn

from lora_exp.adapters.layers.trained_biases import CHILD, remove_biases

if TYPE_CHECKING:
    from lora_exp.adapters.layers.adapted import LoRALayerBase


def strip(layer: LoRALayerBase) -> nn.Module:
    """The layer itself, back in the class it had before it was adapted."""
    plain: nn.Module = layer
    original = layer.plain_class()
    del layer.adapters
    for key in layer.own_attributes:
        layer.__dict__.pop(key, None)
    plain.__class__ = original
    if "_old_forward" in plain.__dict__:  # accelerate's, see injection
        plain.__dict__["_old_forward"] = original.forward.__get__(plain)
    return plain


def allow_fast_paths(model: nn.Module) -> None:
    """Undo what keeps torch's encoder from reading the weights of adapted layers without calling them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            act = layer.activation
            layer.activation_relu_or_gelu = (
                1
                if act is F.relu or isinstance(act, nn.ReLU)
                else 2
                if act is F.gelu or isinstance(act, nn.GELU)
                else 0
            )
    for encoder in encoders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why a layer has no fast path
            like: Any = nn.TransformerEncoder(encoder.layers[0], 0, None, encoder.enable_nested_tensor)
        encoder.use_nested_tensor = like.use_nested_tensor


def merged_copy(layer: LoRALayerBase) -> Any:
    """A plain layer of the original class with the active adapter merged in; `layer` stays as it is."""
    twin = copy.copy(layer)
    twin.__dict__ = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(layer).items()}
    weight = layer.adapter.merged(layer).detach().to(layer.merged_dtype)
    trained: Any = twin._modules.get(CHILD)
    if trained is not None:
        remove_biases(twin)
    twin.weight = nn.Parameter(weight)  # first: a quantised layer goes back to another class with a dense weight
    strip(twin)
    if isinstance(bias := getattr(twin, "bias", None), nn.Parameter):
        name = layer.adapter.name
        own = trained.values[name] if trained is not None and name in trained.values else bias
        twin.bias = nn.Parameter(own.detach().to(bias.dtype, copy=True))
    return twin
