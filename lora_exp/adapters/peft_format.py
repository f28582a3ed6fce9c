"""PEFT's adapter folders, both ways: adapter_config.json, adapter_model.safetensors, README.md.

Letters: r rank, in / out features, V entries and d width of an embedding, k... a kernel's extents.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .contents import bias_parameters, saved_tensors
from .files import copy_strictly, read_tensors, write_tensors
from .layer import LoRALayerBase
from .peft_config import from_peft, to_peft
from .walk import base_modules, joined, lora_layers

if TYPE_CHECKING:
    from .config import LoraConfig
    from .model import LoraModel

log = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = "lora_exp"  # our own notes, in the tensor file's metadata: PEFT warns about keys it does not know
_CARD = """---
base_model: {base}
library_name: peft
tags: [lora]
---

# {kind} adapter of rank {rank}

Trained on `{base}` (SHA-256 of its weights: `{sha256}`). Load it with PEFT
(`PeftModel.from_pretrained(base, folder)`) or lora_exp (`LoraModel.from_pretrained(base, folder)`).
"""


def save(model: LoraModel, directory: str | Path, name: str) -> None:
    """Write adapter `name`; what PEFT cannot represent is refused before anything is written."""
    config, folder = model.configs[name], Path(directory)
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder to write the adapter to")
    if reasons := [reason for _, layer in _adapted(model, name) if (reason := _unrepresentable(layer))]:
        raise ValueError(
            f"PEFT's format cannot hold this adapter: {reasons[0]}; use save_model, which writes one safetensors file"
        )
    notes = _notes(model, config)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, peft_views(model, name), {_OURS: json.dumps(notes)})
    _write_text(folder / CONFIG_NAME, json.dumps(to_peft(model, name), indent=2, sort_keys=True))
    kind = "DoRA" if config.use_dora else "LoRA"
    card = _CARD.format(base=notes["base"], kind=kind, rank=config.rank, sha256=notes["base_sha256"])
    _write_text(folder / "README.md", card)


def read_config(directory: str | Path, model: nn.Module) -> LoraConfig:
    """The LoraConfig that a folder's adapter needs on `model`."""
    path = Path(directory) / CONFIG_NAME
    if not path.is_file():
        raise ValueError(f"{path} is not there; give the folder of an adapter in PEFT's format")
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); copy the adapter anew") from error
    names = [name for name, _ in base_modules(model)]
    tensors, metadata = _read_weights(Path(directory))[1:]
    if not any(key.endswith(".bias") for key in tensors):
        stored["bias"] = "none"  # PEFT lets a wish for biases pass where the model has none
    notes = json.loads(metadata.get(_OURS, "{}"))
    return from_peft(stored, names, str(path), detach_norm=notes.get("dora_detach_norm", True))


def load(model: LoraModel, directory: str | Path, name: str, strict_base: bool) -> None:
    """Fill adapter `name` from a folder; keys and shapes must fit exactly."""
    path, tensors, metadata = _read_weights(Path(directory))
    views = peft_views(model, name)
    copy_strictly(path, _without_base(path, tensors, model, views), views)
    _check_base(model, json.loads(metadata.get(_OURS, "{}")), path, strict_base)


def peft_views(model: LoraModel, name: str) -> dict[str, Tensor]:
    """Everything adapter `name` trains, under PEFT's keys, as views in PEFT's layout of our own tensors."""
    views: dict[str, Tensor] = {}
    for layer_name, layer in _adapted(model, name):
        for key, view in _layer_views(layer, name).items():
            views[_PREFIX + joined(layer_name, key)] = view
    adapted = {layer_name for layer_name, _ in _adapted(model, name)}
    for key, bias in bias_parameters(model.wrapped, name).items():
        owner = key.rpartition(".")[0]
        views[_PREFIX + (joined(owner, "base_layer.bias") if owner in adapted else key)] = bias.detach()
    for key, tensor in saved_tensors(model.wrapped, name).items():
        views[_PREFIX + key] = tensor.detach()
    return views


def _layer_views(layer: LoRALayerBase, name: str) -> dict[str, Tensor]:
    """A (r, in), B (out, r); embeddings (r, V), (d, r); convolutions (r, C_in, k...), (C_out, r, 1...)."""
    adapter: Any = layer.adapters[name]
    lora_A, lora_B = adapter.lora_A.detach(), adapter.lora_B.detach()
    if layer.layer_type == "linear":
        views = {"lora_A.weight": lora_A.T, "lora_B.weight": lora_B.T}
    elif layer.layer_type == "embedding":
        views = {"lora_embedding_A": lora_A.T, "lora_embedding_B": lora_B.T}
    else:
        pointwise = (-1, lora_B.shape[0], *[1] * (lora_A.dim() - 2))
        views = {"lora_A.weight": lora_A, "lora_B.weight": lora_B.T.view(pointwise)}
    if hasattr(adapter, "magnitude"):
        views["lora_magnitude_vector"] = adapter.magnitude.detach()
        if layer.layer_type.startswith("conv"):
            views["lora_magnitude_vector"] = layer.along_output(adapter.magnitude.detach())[None]
    return views


def _adapted(model: LoraModel, name: str) -> list[tuple[str, LoRALayerBase]]:
    return [(layer_name, layer) for layer_name, layer in lora_layers(model.wrapped) if name in layer.adapters]


def _unrepresentable(layer: Any) -> str | None:
    """Why PEFT (0.21) would compute something else from this layer's adapter."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return None
    if layer.groups > 1:
        return f"a convolution with groups={layer.groups}, whose A PEFT does not group"
    if any(step != 1 for step in layer.dilation):
        return f"a convolution with dilation={tuple(layer.dilation)}, which PEFT's A drops"
    if layer.padding_mode != "zeros":
        return f"a convolution with padding_mode={layer.padding_mode!r}, which PEFT's A drops"
    return None


def _notes(model: LoraModel, config: LoraConfig) -> dict[str, Any]:
    base = getattr(model.wrapped, "name_or_path", None) or type(model.wrapped).__name__
    return {
        "base": str(base),
        "base_sha256": model.base_sha256(),
        "dora_detach_norm": config.dora_detach_norm,
    }


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    older = folder / "adapter_model.bin"
    if older.is_file() and not (folder / WEIGHTS_NAME).is_file():
        return older, torch.load(older, map_location="cpu", weights_only=True), {}
    tensors, metadata = read_tensors(folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME, tensors, metadata


def _without_base(
    path: Path, tensors: Mapping[str, Tensor], model: LoraModel, views: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Leave out what PEFT writes beside the adapter: copies of base embeddings, second copies of biases."""
    base = dict(_base_tensors(model))
    kept: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        plain = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
        if key in views:
            kept[key] = tensor
        elif ".original_module." in key or ".modules_to_save." in key:
            continue
        elif plain in base:
            _check_same(path, plain, tensor, base[plain])
        else:
            kept[key] = tensor
    return kept


def _base_tensors(model: LoraModel) -> list[tuple[str, Tensor]]:
    found: list[tuple[str, Tensor]] = []
    for name, module in base_modules(model.wrapped):
        found += [(joined(name, key), p) for key, p in module._parameters.items() if p is not None]
    return found


def _check_same(path: Path, name: str, stored: Tensor, base: Tensor) -> None:
    same = stored.shape == base.shape and torch.allclose(stored.float(), base.detach().cpu().float(), 1e-2, 1e-3)
    if not same:
        raise ValueError(
            f"{path} brings base weights of its own for {name} that differ from this model's; "
            "load the base (with the same vocabulary) that the adapter was trained on"
        )


def _check_base(model: LoraModel, notes: Mapping[str, Any], path: Path, strict_base: bool) -> None:
    trained_on = notes.get("base_sha256")
    if trained_on is None or model.base_sha256() in (None, trained_on):
        return
    said = f"{path} was trained on other base weights ({notes.get('base')}, SHA-256 {trained_on[:12]}...)"
    if strict_base:
        raise ValueError(f"{said}; load that base, or pass strict_base=False if this is a copy of it")
    log.warning("%s; another dtype or a quantised copy is normal, another model is not", said)


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text + "\n")
    partial.replace(path)
