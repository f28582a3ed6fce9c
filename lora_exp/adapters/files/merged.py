"""A whole model with an adapter merged in, as one safetensors file that knows which ties were undone."""

from __future__ import annotations

import json
from pathlib import Path

from torch import nn

from lora_exp.adapters.files.safetensors import read_tensors
from lora_exp.adapters.inspection.ties import separate, undo_ties, weight_ties
from lora_exp.errors import UserError

_UNTIED = "untied"  # key of the file's metadata: groups of names that were one weight of the base


def untied_metadata(groups: list[list[str]]) -> dict[str, str]:
    """What a merged file says of them."""
    return {_UNTIED: json.dumps(groups)} if groups else {}


def load_merged(model: nn.Module, path: str | Path) -> nn.Module:
    """Load what `save_model(merge_weights=True)` wrote into a plain model of the original class, strictly.

    Ties of which one side was adapted are undone first, in the model and in its transformers config; with
    `load_state_dict` alone the last of the tied names would decide. Returns `model`.
    """
    tensors, metadata = read_tensors(path)
    before = [set(names) for names in json.loads(metadata.get(_UNTIED, "[]"))]
    ties = weight_ties(model)
    known = dict(model.named_parameters(remove_duplicate=False))
    for names in before:
        separate(model, [name for name in names if name in known])
    undo_ties(model, [group for group in ties if any(names & group for names in before)])
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit this model ({error}); load it into the base's own class") from error
    return model
