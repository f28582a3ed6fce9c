"""LoraConfig to PEFT's adapter_config.json and back."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from torch import nn

from lora_exp.adapters.config import Json, LoraConfig
from lora_exp.adapters.files.peft_parameters import layers_alone, named_stacks, shortest_targets
from lora_exp.adapters.files.peft_starts import doubled, halved
from lora_exp.adapters.files.peft_targets import (
    Wish,
    adapted_names,
    all_linear,
    check_types,
    covering,
    is_all_linear,
    matched,
    saved_names,
)
from lora_exp.adapters.inspection.traversal import base_modules, lora_layers, saved_modules
from lora_exp.adapters.layers.transformers_conv1d import LoRAConv1D
from lora_exp.adapters.surgery.targets import find_targets, suffixes
from lora_exp.adapters.variants.peft_format import PeftFormat
from lora_exp.adapters.variants.registry import peft_formats, variant_named
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.model import LoraModel

log = logging.getLogger(__name__)
_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
_CLASSIFIER = "ForSequenceClassification"
_HEADS = ("classifier", "score")  # which PEFT looks for in the file of a classifier's adapter


def to_peft(model: LoraModel, name: str) -> Json:
    """The adapter's config in PEFT's words, with targets that mean the same layers there."""
    config = model.configs[name]
    adapted = {n: layer for n, layer in lora_layers(model.wrapped) if name in layer.adapters}
    modules = dict(base_modules(model.wrapped))
    stacks = {n for n, layer in adapted.items() if layer.is_stack}
    saved = [n for n, switch in saved_modules(model.wrapped) if name in switch.copies]
    method = variant_named(config.variant).peft_format
    return {
        "peft_type": method.peft_type,
        "task_type": _task(type(model.wrapped).__name__, saved),
        **base_name(model.wrapped),
        **method.fields(config),
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in adapted.values()),
        "inference_mode": True,
        **doubled(config),
        **_targets(config, method.takes_exclusions, not stacks, set(adapted) - stacks, list(layers_alone(modules))),
        # PEFT refuses dropout beside target_parameters; what was asked for stands in our notes.
        **({"target_parameters": shortest_targets(stacks, modules), "lora_dropout": 0.0} if stacks else {}),
    }


def _task(kind: str, saved: list[str]) -> str | None:
    if kind.endswith(_CLASSIFIER):
        return "SEQ_CLS" if any(name in _HEADS for name in saved) else None
    return next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None)


def base_name(base: nn.Module) -> dict[str, str | None]:
    """The base's hub name and commit, or the path that its user gave; a folder of the hub's cache is its name."""
    name = getattr(base, "name_or_path", None) or None
    commit = getattr(getattr(base, "config", None), "_commit_hash", None)
    if name and (cached := re.search(r"models--([^/\\]+)--([^/\\]+)[/\\]snapshots[/\\](\w+)[/\\]?$", str(name))):
        name, commit = f"{cached[1]}/{cached[2]}", cached[3]
    return {"base_model_name_or_path": str(name) if name else None, "revision": commit}


def from_peft(stored: Json, model: nn.Module, trained: Collection[str], source: str, notes: Json) -> LoraConfig:
    """A LoraConfig that means on `model` what `stored` means to PEFT; features that we do not have are refused.

    trained: the names of the layers that the folder has factors for. notes: what we noted beside them.
    """
    method = method_of(stored, source)
    method.check(stored, source)
    modules = dict(base_modules(model))
    alone = layers_alone(modules)
    check_types(stored, source)
    stored, start = halved(stored, notes)
    wish = dict(stored)
    if is_all_linear(stored.get("target_modules")):
        wish["target_modules"] = sorted(all_linear(model, modules, stored.get("task_type")))
    elif stored.get("target_modules") is None:
        wish["target_modules"] = sorted(set(trained) & set(alone))  # PEFT knows each architecture's; the file says so
    stacks = named_stacks(stored.get("target_parameters"), modules, source)
    layers, saved = adapted_names(wish, alone) | stacks, saved_names(wish, alone)
    if not layers:
        raise UserError(
            f"{source}: target_modules={stored.get('target_modules')!r} leaves no layer of this model to adapt; "
            "load the base that the adapter was trained on"
        )
    _check_ties(stored, model, layers | saved, source)
    config = LoraConfig(
        target_modules=_all_targets(_present(wish["target_modules"], alone), stored, layers),
        exclude_modules=_present(stored.get("exclude_modules"), modules),
        layers_to_transform=stored.get("layers_to_transform") or None,
        rank_pattern=matched(stored.get("rank_pattern"), layers),
        alpha_pattern=matched(stored.get("alpha_pattern"), layers),
        modules_to_save=sorted(saved) or None,
        **method.arguments(stored, notes),
        **start,
    )
    return _meaning(config, layers, model, modules)


def method_of(stored: Json, source: str) -> PeftFormat:
    """The format of the PEFT method that a config is of."""
    known: dict[str, PeftFormat] = peft_formats()
    if (method := known.get(str(stored.get("peft_type")))) is None:
        only = " or ".join(sorted(known))
        raise UserError(
            f"{source} holds a {stored.get('peft_type')!r} adapter; only {only} can be read here: load it by PEFT"
        )
    return method


def _check_ties(stored: Json, model: nn.Module, used: Collection[str], source: str) -> None:
    """PEFT keeps one adapter for an embedding and the head tied to it, if asked to; we have two."""
    embedding = getattr(model, "get_input_embeddings", lambda: None)()
    weight = getattr(embedding, "weight", None)
    tied = {n for n, m in base_modules(model) if weight is not None and m._parameters.get("weight") is weight}
    if stored.get("ensure_weight_tying") and len(tied) > 1 and tied & set(used):
        raise UserError(
            f"{source} uses ensure_weight_tying for {', '.join(sorted(tied))}, one adapter on tied weights, which this "
            "library does not have; load it with PEFT"
        )


def _meaning(config: LoraConfig, layers: set[str], model: nn.Module, modules: dict[str, nn.Module]) -> LoraConfig:
    """The config in its own words if they mean these layers here too, else with each layer's name."""
    try:
        if set(find_targets(model, modules, config).layers) == layers:
            return config
    except UserError as error:  # PEFT passes over names that we refuse
        log.debug("each layer is named instead, as the config's own words are refused here: %s", error)
    listed = sorted(layers)
    exact = set(filter(covering(listed), modules)) == layers
    target = listed if exact else "|".join(map(re.escape, listed))
    return dataclasses.replace(config, target_modules=target, exclude_modules=None, layers_to_transform=None)


def _targets(config: LoraConfig, takes_exclusions: bool, as_wished: bool, adapted: set[str], names: list[str]) -> Json:
    """The user's own wish where PEFT may read it alike (`as_wished`) and does, else last names, else full names."""
    own: Json = {"target_modules": config.target_modules, "layers_to_transform": config.layers_to_transform}
    if takes_exclusions:
        own["exclude_modules"] = config.exclude_modules
    says_all = as_wished and (takes_exclusions or config.exclude_modules is None)
    if says_all and _peft_adapts(own, config, names) == adapted:
        return own
    endings = {"target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
    if _peft_adapts(endings, config, names) == adapted:
        return endings
    listed = {"target_modules": sorted(adapted)}
    if _peft_adapts(listed, config, names) == adapted:
        return listed
    return {"target_modules": "|".join(map(re.escape, sorted(adapted)))}


def _peft_adapts(wish: Wish, config: LoraConfig, names: list[str]) -> set[str] | None:
    """The modules that PEFT would adapt; None where it would refuse or choose by type."""
    target = wish["target_modules"]
    refuses = isinstance(target, str) and wish.get("layers_to_transform") is not None
    if target is None or is_all_linear(target) or refuses:
        return None
    return adapted_names({**wish, "modules_to_save": config.modules_to_save}, names)


def _all_targets(
    modules_named: list[str] | str | None, stored: Json, layers: Collection[str]
) -> list[str] | str | None:
    """What `target_modules` and `target_parameters` name, in one list."""
    if not (parameters := stored.get("target_parameters")):
        return modules_named
    return sorted(layers) if isinstance(modules_named, str) else [*(modules_named or []), *parameters]


def _present(wish: list[str] | str | None, names: Iterable[str]) -> list[str] | str | None:
    """A wish without what names nothing here: PEFT lets it pass, and writes it to its files."""
    if isinstance(wish, list):
        known = {suffix for name in names for suffix in suffixes(name)}
        return [entry for entry in wish if entry in known] or None
    return wish if wish and any(map(covering(wish), names)) else None
