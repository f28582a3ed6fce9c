"""LoraConfig to PEFT's adapter_config.json and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .config import LoraConfig
from .targets import matches_pattern
from .transposed import LoRAConv1D
from .walk import base_modules, lora_layers, saved_modules

if TYPE_CHECKING:
    from .model import LoraModel

_TASKS = {"ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM"}
_REWRITES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that change base weights
_UNKNOWN = (
    "lora_bias",
    "use_qalora",
    "velora_config",
    "kasa_config",
    "arrow_config",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "layers_pattern",
    "megatron_config",
    "use_bdlora",
    "monteclora_config",
)


def to_peft(model: LoraModel, name: str) -> dict[str, Any]:
    """The adapter's config in PEFT's words, with targets that mean the same layers there."""
    config = model.configs[name]
    adapted = {n: layer for n, layer in lora_layers(model.wrapped) if name in layer.adapters}
    saved = [n for n, switch in saved_modules(model.wrapped) if name in switch.copies]
    kind = type(model.wrapped).__name__
    alpha = config.lora_alpha
    return {
        "peft_type": "LORA",
        "task_type": next((task for ending, task in _TASKS.items() if kind.endswith(ending)), None),
        "base_model_name_or_path": getattr(model.wrapped, "name_or_path", None) or None,
        "r": config.rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": config.lora_dropout,
        "bias": config.bias,
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
        "rank_pattern": config.rank_pattern or {},
        "alpha_pattern": config.alpha_pattern or {},
        "modules_to_save": saved or None,
        "fan_in_fan_out": any(isinstance(layer, LoRAConv1D) for layer in adapted.values()),
        "init_lora_weights": True,
        "inference_mode": True,
        **_targets(config, set(adapted), [n for n, _ in base_modules(model.wrapped)]),
    }


def from_peft(stored: dict[str, Any], names: Sequence[str], source: str, detach_norm: bool) -> LoraConfig:
    """A LoraConfig for a model with modules `names`; features that we do not have are refused."""
    if stored.get("peft_type") != "LORA":
        raise ValueError(f"{source} holds a {stored.get('peft_type')!r} adapter; only LORA can be read here")
    if used := [key for key in _UNKNOWN if stored.get(key)]:
        raise ValueError(f"{source} uses {', '.join(used)}, which this library does not have; load it with PEFT")
    start = str(stored.get("init_lora_weights"))
    if start.startswith(_REWRITES_BASE):
        raise ValueError(
            f"{source} was initialised with {start!r}, which changes the base weights; convert it to plain "
            "LoRA with PEFT's path_initial_model_for_weight_conversion first"
        )
    return LoraConfig(
        rank=stored["r"],
        target_modules=_present(stored.get("target_modules"), names),
        exclude_modules=_present(stored.get("exclude_modules"), names),
        lora_alpha=stored["lora_alpha"],
        lora_dropout=stored.get("lora_dropout", 0.0),
        bias=stored.get("bias", "none"),
        use_rslora=stored.get("use_rslora", False),
        use_dora=stored.get("use_dora", False),
        layers_to_transform=stored.get("layers_to_transform"),
        rank_pattern=_matched(stored.get("rank_pattern"), names),
        alpha_pattern=_matched(stored.get("alpha_pattern"), names),
        modules_to_save=_present(stored.get("modules_to_save"), names),
        dora_detach_norm=detach_norm,
    )


def _targets(config: LoraConfig, adapted: set[str], names: list[str]) -> dict[str, Any]:
    """The user's own wish where PEFT reads it alike, else last names, else full names."""
    own = {
        "target_modules": config.target_modules,
        "exclude_modules": config.exclude_modules,
        "layers_to_transform": config.layers_to_transform,
    }
    if _peft_matches(own, config, names) == adapted:
        return own
    endings = {"target_modules": sorted({name.rpartition(".")[2] for name in adapted})}
    if _peft_matches(endings, config, names) == adapted:
        return endings
    return {"target_modules": sorted(adapted)}


def _peft_matches(wish: dict[str, Any], config: LoraConfig, names: Iterable[str]) -> set[str] | None:
    """The modules that PEFT would adapt; None where it would refuse or choose by type."""
    target, blocks = wish["target_modules"], wish.get("layers_to_transform")
    if target is None or target == "all-linear" or (isinstance(target, str) and blocks is not None):
        return None
    found = {name for name in names if _covers(target, name) and not _covers(wish.get("exclude_modules"), name)}
    saved = config.modules_to_save or []
    found = {n for n in found if not any(re.match(rf"(^|.*\.){s}($|\..*)", n) for s in saved)}
    if blocks is None:
        return found
    wanted = {blocks} if isinstance(blocks, int) else set(blocks)
    index = {n: m for n in found if (m := re.match(r".*?\.[^.]*\.(\d+)\.", n))}
    return {n for n, match in index.items() if int(match[1]) in wanted}


def _covers(wish: list[str] | str | None, name: str) -> bool:
    if wish is None:
        return False
    if isinstance(wish, str):
        return re.fullmatch(wish, name) is not None
    return any(name == entry or name.endswith(f".{entry}") for entry in wish)


def _present(wish: Any, names: Sequence[str]) -> Any:
    """A list without entries that name nothing here: PEFT lets them pass, and writes them to its files."""
    if not isinstance(wish, list):
        return wish
    return [entry for entry in wish if any(_covers([entry], name) for name in names)] or None


def _matched(patterns: dict[str, Any] | None, names: Sequence[str]) -> dict[str, Any] | None:
    found = {key: value for key, value in (patterns or {}).items() if any(matches_pattern(key, n) for n in names)}
    return found or None
