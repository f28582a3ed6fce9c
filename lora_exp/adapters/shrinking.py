"""An adapter cut to a smaller rank: what of each layer's change its largest singular values hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from lora_exp.adapters.config import LoraConfig
from lora_exp.adapters.inspection import adapter_state
from lora_exp.adapters.inspection.changes import Change, unmeasured
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.model import LoraModel
from lora_exp.adapters.starts.start import Given
from lora_exp.errors import UserError


def add_shrunk(model: LoraModel, source: str, name: str, rank: int, found: Mapping[str, Change]) -> None:
    """Add a plain LoRA adapter whose changes are the best of `rank` of those of `source`, which are `found` by layer.

    Biases and modules that `source` trains stay as they are. Raises UserError for layers whose weight is many matrices.
    """
    if left := unmeasured(model.wrapped, source):
        raise UserError(f"adapter {source!r} cannot be cut: {left[0]} has many matrices in one weight")
    model.add_adapter(name, shrunk_config(model.configs[source], rank), Given(fills=False))
    with torch.no_grad():
        for layer_name, layer in lora_layers(model.wrapped):
            if name in layer.adapters:
                _fill(layer, name, found[layer_name])
        _copy_others(model, source, name)


def shrunk_config(config: LoraConfig, rank: int) -> LoraConfig:
    """The config of an adapter of the same layers, plain, with a scale of 1."""
    plain: dict[str, Any] = {"variant": "lora", "variant_options": {}, "use_dora": False, "dora_detach_norm": True}
    begun: dict[str, Any] = {"start": "default", "start_options": {}, "rank_pattern": None, "alpha_pattern": None}
    scaled: dict[str, Any] = {"rank": rank, "lora_alpha": float(rank), "use_rslora": False}
    return dataclasses.replace(config, **plain, **begun, **scaled)


def _fill(layer: LoRALayerBase, name: str, change: Change) -> None:
    adapter = layer.adapter_named(name)
    matrices = layer.matrices(adapter.lora_A.data, adapter.lora_B.data)
    assert matrices is not None
    _, A, B = matrices  # views: (K, r), (r, N)
    kept = min(adapter.rank, len(change.S))
    root = change.S[:kept].sqrt()  # shared out evenly
    A.zero_()
    B.zero_()
    A[:, :kept] = change.V[:, :kept] * root
    B[:kept] = root[:, None] * change.U[:, :kept].T


def _copy_others(model: LoraModel, source: str, name: str) -> None:
    theirs, ours = model.adapter_tensors(source), model.adapter_tensors(name)
    factors = adapter_state.factor_tensors(model.wrapped, name)
    for key in ours.keys() - factors.keys():
        ours[key].copy_(theirs[key])
