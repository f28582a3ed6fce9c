"""Starts in PEFT's folders: a change AB - A0 B0 is there a plain LoRA of twice the rank, as PEFT converts its own.

In PEFT's layout, whatever the kind of layer: A (r, ...) and B (out, r, ...) become [A, A0] and [B, -B0]. What we note
beside them gives back the adapter that is trained.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lora_exp.adapters.config import Json, LoraConfig
from lora_exp.adapters.starts.registry import start_named
from lora_exp.adapters.variants.lora import AT_START
from lora_exp.errors import UserError

_RANK_AXIS = {"A": 0, "B": 1}


def doubled(config: LoraConfig) -> Json:
    """What PEFT is told of ranks and alphas instead of the config's own, where the file has both products."""
    if not start_named(config.start).is_subtracted:
        return {}
    alpha = math.sqrt(2) if config.use_rslora else 2  # the scale is alpha / sqrt(r) or alpha / r
    return {
        "r": 2 * config.rank,
        "lora_alpha": alpha * config.lora_alpha,
        "rank_pattern": {key: 2 * rank for key, rank in (config.rank_pattern or {}).items()},
        "alpha_pattern": {key: alpha * value for key, value in (config.alpha_pattern or {}).items()},
    }


def notes_of(config: LoraConfig) -> Json:
    """What a reader of ours has to know of the start, and of what was doubled."""
    noted = ("rank", "lora_alpha", "rank_pattern", "alpha_pattern")
    return {
        "start": config.start,
        "start_options": dict(config.start_options),
        "before_doubling": {key: getattr(config, key) for key in noted},
    }


def halved(stored: Json, notes: Json) -> tuple[Json, Json]:
    """(PEFT's config with ranks and alphas as they are trained, the config's start); of a config that was changed
    since it was written, as it is: a plain LoRA with both products in it."""
    start: Json = {key: notes[key] for key in ("start", "start_options") if key in notes}
    try:
        before = LoraConfig(**notes["before_doubling"], use_rslora=stored.get("use_rslora", False), **start)
        peft = doubled(before)
    except (UserError, KeyError, TypeError):  # older notes, a start that is not known here
        return stored, {}
    if any((stored.get(key) or {}) != value for key, value in peft.items()):
        return stored, {}
    if not peft:
        return stored, start
    plain = {"r": before.rank, "lora_alpha": before.lora_alpha}
    return {**stored, **plain, "rank_pattern": before.rank_pattern, "alpha_pattern": before.alpha_pattern}, start


def stored_rank(rank: int, config: LoraConfig) -> int:
    """The rank of a layer's factors in the file."""
    return 2 * rank if start_named(config.start).is_subtracted else rank


def joined_starts(views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """[A, A0] and [B, -B0] in place of the four, all else as it is."""
    found = {key: view for key, view in views.items() if not key.endswith(AT_START)}
    for key in found:
        if (start := views.get(key + AT_START)) is not None:
            found[key] = torch.cat([found[key], start if _axis(key) == 0 else -start], _axis(key))
    return found


def split_starts(tensors: Mapping[str, Tensor], views: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The four again, for an adapter whose `views` are of four."""
    found = dict(tensors)
    for key in tensors:
        axis = _axis(key) if key + AT_START in views else 0
        if key + AT_START in views and tensors[key].dim() > axis:
            rank = views[key].shape[axis]
            found[key], start = tensors[key].split([rank, tensors[key].shape[axis] - rank], axis)
            found[key + AT_START] = start if axis == 0 else -start
    return found


def _axis(key: str) -> int:
    """The dimension that counts the rank of what `.lora_A.weight`, `.lora_embedding_B` and the like stand for."""
    return _RANK_AXIS[key.removesuffix(".weight")[-1]]
