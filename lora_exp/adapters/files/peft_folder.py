"""PEFT's adapter folders, both ways: adapter_config.json, adapter_model.safetensors, README.md.

Letters: r rank, in / out features, V entries and d width of an embedding, k... a kernel's extents.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lora_exp.adapters.files.peft_card import card
from lora_exp.adapters.files.peft_config import base_name, from_peft, method_of, to_peft
from lora_exp.adapters.files.peft_parameters import named_stacks, peft_names, stacked_weights
from lora_exp.adapters.files.peft_starts import joined_starts, notes_of, split_starts, stored_rank
from lora_exp.adapters.files.safetensors import copy_strictly, read_json, read_tensors, write_tensors
from lora_exp.adapters.files.whole import write_text
from lora_exp.adapters.inspection.adapter_state import bias_parameters, saved_tensors
from lora_exp.adapters.inspection.traversal import base_modules, joined, lora_layers
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.surgery.targets import value_for
from lora_exp.adapters.variants.peft_format import PeftFormat
from lora_exp.adapters.variants.registry import variant_named
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.config import Json, LoraConfig
    from lora_exp.adapters.model import LoraModel

log = logging.getLogger(__name__)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_OURS = "lora_exp"  # our own notes, in the tensor file's metadata: PEFT warns about keys it does not know


@dataclasses.dataclass(frozen=True)
class Stored:
    """What a folder holds: the config that its adapter needs, its tensors by PEFT's keys, our own notes."""

    config: LoraConfig
    path: Path
    tensors: dict[str, Tensor]
    notes: Json


def save(model: LoraModel, directory: str | Path, name: str, base_files_sha256: str | None = None) -> None:
    """Write adapter `name`; what PEFT cannot represent is refused before anything is written."""
    config, folder = model.configs[name], Path(directory)
    if folder.is_file():
        raise UserError(f"{folder} is a file; give the folder to write the adapter to")
    hosts, method = [layer for _, layer in _adapted(model, name)], variant_named(config.variant).peft_format
    if reason := method.refusal(config, hosts):
        raise UserError(
            f"PEFT's format cannot hold this adapter: {reason}; use save_model, which writes one safetensors file"
        )
    stored, notes = to_peft(model, name), _notes(model, config, base_files_sha256)
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / WEIGHTS_NAME, joined_starts(peft_views(model, name)), {_OURS: json.dumps(notes)})
    # Patterns keep their order: the first that matches a layer counts.
    write_text(folder / CONFIG_NAME, json.dumps(dict(sorted(stored.items())), indent=2) + "\n")
    write_text(folder / "README.md", card(stored, notes))


def read(directory: str | Path, model: nn.Module) -> Stored:
    """A folder's adapter, checked as far as it can be before `model` is changed."""
    folder = Path(directory)
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise UserError(f"{path} is not there; give the folder of an adapter in PEFT's format")
    stored = read_json(path.read_text(encoding="utf-8", errors="replace"), str(path))
    weights, tensors, metadata = _read_weights(folder)
    if not any(key.endswith(".bias") for key in tensors):
        stored["bias"] = "none"  # PEFT lets a wish for biases pass where the model has none
    notes = read_json(metadata.get(_OURS, "{}"), f"the notes in {weights}")
    ranks = _stored_ranks(method_of(stored, str(path)), tensors, _stacks(stored, model, str(path)))
    config = from_peft(stored, model, list(ranks), str(path), notes)
    _check_ranks(weights, ranks, config)
    return Stored(config, weights, tensors, notes)


def fill(model: LoraModel, name: str, stored: Stored, strict_base: bool) -> None:
    """Fill adapter `name` from a folder; keys and shapes must fit exactly."""
    views = peft_views(model, name)
    tensors = split_starts(stored.tensors, views)
    copy_strictly(stored.path, _without_base(stored.path, tensors, model, views), views)
    _check_base(model, stored.notes, stored.path, strict_base)


def peft_views(model: LoraModel, name: str) -> dict[str, Tensor]:
    """All that a file holds of adapter `name`, under PEFT's keys, as views in PEFT's layout of our own tensors."""
    views: dict[str, Tensor] = {}
    adapted = dict(_adapted(model, name))
    stacks = [layer_name for layer_name, layer in adapted.items() if layer.is_stack]
    theirs = (
        {our: peft for peft, our in peft_names(stacks, dict(base_modules(model.wrapped))).items()} if stacks else {}
    )
    for layer_name, layer in adapted.items():
        adapter = layer.adapter_named(name)
        for key, view in adapter.peft_tensors(layer).items():
            views[_PREFIX + joined(theirs.get(layer_name, layer_name), key)] = view
    method = variant_named(model.configs[name].variant).peft_format
    views.update(method.shared_tensors([layer.adapter_named(name) for layer in adapted.values()]))
    for key, bias in bias_parameters(model.wrapped, name).items():
        owner = key.rpartition(".")[0]
        views[_PREFIX + (joined(owner, "base_layer.bias") if owner in adapted else key)] = bias.detach()
    for key, tensor in saved_tensors(model.wrapped, name).items():
        views[_PREFIX + key] = tensor.detach()
    return views


def _adapted(model: LoraModel, name: str) -> list[tuple[str, LoRALayerBase]]:
    return [(layer_name, layer) for layer_name, layer in lora_layers(model.wrapped) if name in layer.adapters]


def _notes(model: LoraModel, config: LoraConfig, base_files_sha256: str | None) -> Json:
    return {
        "base": base_name(model.wrapped)["base_model_name_or_path"] or type(model.wrapped).__name__,
        "base_values_sha256": model.base_sha256(),
        "base_files_sha256": base_files_sha256,
        "dora_detach_norm": config.dora_detach_norm,
        "lora_dropout": config.lora_dropout,
        "variant": config.variant,
        "variant_options": dict(config.variant_options),
        **notes_of(config),
    }


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor], dict[str, str]]:
    older = folder / "adapter_model.bin"
    if older.is_file() and not (folder / WEIGHTS_NAME).is_file():
        return older, _read_pickle(older), {}
    tensors, metadata = read_tensors(folder / WEIGHTS_NAME)
    return folder / WEIGHTS_NAME, tensors, metadata


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes led it to, with advice that is to run what is in there
        raise UserError(
            f"{path} cannot be read as tensors alone; it is damaged, or holds what could run code and is never loaded: "
            "copy it anew, or have its owner save it as adapter_model.safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(key, str) and _has_values(found[key]) for key in found):
        raise UserError(f"{path} holds something else than named tensors; give an adapter in PEFT's format")
    return found


def _has_values(found: object) -> bool:
    return isinstance(found, Tensor) and found.layout == torch.strided and not found.is_meta


def _stacks(stored: Json, model: nn.Module, source: str) -> dict[str, tuple[str, int]]:
    """{PEFT's name: (ours, how many weights)} of the stacks that a folder has factors for."""
    modules = dict(base_modules(model))
    names = peft_names(named_stacks(stored.get("target_parameters"), modules, source), modules)
    return {peft: (our, stacked_weights(modules[our])) for peft, our in names.items()}


def _stored_ranks(
    method: PeftFormat, tensors: Mapping[str, Tensor], stacks: Mapping[str, tuple[str, int]]
) -> dict[str, int]:
    """The rank of each layer that the file has factors for, by the layer's name; PEFT stacks A by rows."""
    found: dict[str, int] = {}
    for key, tensor in tensors.items():
        if (each := method.stored_rank(key.removeprefix(_PREFIX), tensor)) is not None:
            name, weights = stacks.get(each[0], (each[0], 1))
            found[name] = each[1] // weights
    return found


def _check_ranks(path: Path, ranks: Mapping[str, int], config: LoraConfig) -> None:
    """Before anything is made of a rank that only the config knows, and which may be absurd."""
    for layer, rank in ranks.items():
        asked = stored_rank(int(value_for(layer, config.rank_pattern, config.rank)), config)
        if asked != rank:
            raise UserError(
                f"{path} has {layer} of rank {rank}, where {CONFIG_NAME} asks for {asked}: they are of two adapters; "
                "copy both files anew"
            )


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
        elif ".original_module." in key or key.replace(".modules_to_save.", ".") in views:
            continue  # the base's own, and the second copy of a saved bias
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
        raise UserError(
            f"{path} brings base weights of its own for {name} that differ from this model's; "
            "load the base (with the same vocabulary) that the adapter was trained on"
        )


def _check_base(model: LoraModel, notes: Json, path: Path, strict_base: bool) -> None:
    trained_on = notes.get("base_values_sha256")
    if trained_on is None or model.base_sha256() in (None, trained_on):
        return
    said = f"{path} was trained on other base weights ({notes.get('base')}, identity {str(trained_on)[:12]}...)"
    if strict_base:
        raise UserError(f"{said}; load that base, or pass strict_base=False if this is a copy of it")
    log.warning("%s; a copy in float16 or quantised is normal, another model is not", said)
