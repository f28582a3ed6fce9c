"""Classifiers by transformers: a base's trunk with a new head of as many outputs as the data has classes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from lora_exp.config import ModelConfig
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_NAMES = "new_modules"  # where a model keeps them


def auto_class(shape: Mapping[str, Any]) -> Any:
    """What makes a model: one with a head for classes where the data has any, else a causal language model."""
    return AutoModelForSequenceClassification if "class_names" in shape else AutoModelForCausalLM


def set_classes(facts: PreTrainedConfig, shape: Mapping[str, Any]) -> None:
    """Put the classes' names into a config, and the token that fills rows up, behind which a causal head must look."""
    if "class_names" not in shape:
        return
    names = shape["class_names"]
    facts.id2label, facts.label2id = dict(enumerate(names)), {name: index for index, name in enumerate(names)}
    facts.problem_type = "single_label_classification"
    padding = shape.get("pad_token_id", facts.get_text_config().pad_token_id or 0)
    facts.pad_token_id = facts.get_text_config().pad_token_id = padding


def head_options(facts: PreTrainedConfig, shape: Mapping[str, Any]) -> dict[str, Any]:
    """What ``from_pretrained`` is told for data with classes. A head for others, which a file may have, is replaced."""
    if "class_names" not in shape:
        return {}
    set_classes(facts, shape)
    return {"config": facts, "ignore_mismatched_sizes": True}


def note_new_modules(model: PreTrainedModel, section: ModelConfig, missing: Iterable[str] = ()) -> None:
    """Note what of a classifier is new: its head, and a pooler that the file does not have.

    Raises UserError if the file lacks more, as then it is not this architecture's.
    """
    trunk = f"{model.base_model_prefix}."
    lacking = sorted(name for name in missing if name.startswith(trunk))
    poolers = {found[0] for name in lacking if (found := re.match(rf"{re.escape(trunk)}pooler\b", name))}
    if rest := [name for name in lacking if not name.startswith(tuple(poolers) or ("\0",))]:
        raise UserError(
            f"model={section.label or section.name} lacks {rest[0]} and {len(rest) - 1} other weights of a "
            f"{type(model).__name__}: name a model whose file is whole"
        )
    model.__dict__[_NAMES] = sorted({*heads_of(model), *poolers})


def heads_of(model: PreTrainedModel) -> list[str]:
    """What of a classifier is beside its trunk; [] of other models."""
    if not type(model).__name__.endswith("ForSequenceClassification"):
        return []
    trunk = f"{model.base_model_prefix}."
    return sorted({name.partition(".")[0] for name, _ in model.named_parameters() if not name.startswith(trunk)})


def new_modules(model: nn.Module) -> list[str]:
    """The modules of ``model`` that no file has weights for; they are trained in full."""
    return list(model.__dict__.get(_NAMES, ()))


def unknown_to_transformers(section: ModelConfig, shape: Mapping[str, Any], error: Exception) -> str | None:
    """A message for an architecture that has no classifier; None if ``error`` is about something else."""
    if "class_names" not in shape or "Unrecognized configuration class" not in str(error):
        return None
    kind = re.search(r"(\w+)Config'>", str(error))
    named = f"{section.label or section.name} ({kind[1] if kind else 'its architecture'})"
    return (
        f"model={named} has no classifier of text in transformers: "
        " choose an encoder (model=minilm, model=encoder) or another causal model"
    )


def check_not_quantised(model: nn.Module) -> None:
    """Raise UserError for a new module that is stored quantised: it could not be trained."""
    for name in new_modules(model):
        for inner, module in model.get_submodule(name).named_modules():
            if type(module).__module__.startswith("bitsandbytes"):
                whole = f"{name}.{inner}" if inner else name
                raise UserError(
                    f"{whole} is new and is to be trained, which it cannot be while it is quantised: "
                    f"add quantization.skip_modules=[{name}]"
                )
