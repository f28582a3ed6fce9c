"""A language model on the meta device, which has shapes and no memory, from architecture facts alone."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from lora_exp.config import ModelConfig
from lora_exp.errors import UserError, is_bug
from lora_exp.models.causal_lm import attention_option, attention_problem
from lora_exp.models.heads import auto_class, note_new_modules, set_classes, unknown_to_transformers
from lora_exp.models.kind import Outline
from lora_exp.models.positions import length_problem
from lora_exp.models.source import Source

transformers.utils.logging.set_verbosity_error()


def outline(section: ModelConfig, positions: int | None, shape: Mapping[str, Any]) -> Outline:
    """What makes a new model on the meta device, in a given dtype, as training would load it for such data.

    Raises UserError for facts that cannot be had, or rows of more ``positions`` than it has.
    """
    facts = facts_of(section)
    label, field = section.label or section.name, "max_length" if "max_length" in shape else "block_size"
    if positions is not None and (problem := length_problem(facts.to_dict(), positions, label, field)):
        raise UserError(problem)
    return lambda dtype: meta_model(copy.deepcopy(facts), section, dtype, shape)


def facts_of(section: ModelConfig) -> PreTrainedConfig:
    """The transformers config: of ``model.path`` if set, else the YAML's architecture, else the hub's config.json.

    Raises UserError for a path without one, for facts that describe no known model, and for a hub out of reach.
    """
    if section.path:
        return _from_file(section)
    if section.architecture:
        return _from_facts(dict(section.architecture), f"model={section.label}")
    source = Source(section.name or "", section.revision, section.trust_remote_code)
    try:
        known: PreTrainedConfig = AutoConfig.from_pretrained(source.name, **source.options)
        return known
    except (OSError, ValueError) as error:
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise UserError(
            f"The config.json of {section.name} cannot be had ({reason}): name a local one by "
            "model.path=FILE_OR_FOLDER, or plan a model whose architecture is shipped (--help lists them)"
        ) from error


def meta_model(
    facts: PreTrainedConfig, section: ModelConfig, dtype: torch.dtype, shape: Mapping[str, Any] | None = None
) -> nn.Module:
    """The language model in ``dtype`` on the meta device, for data of classes with a head for them.

    Raises UserError if transformers has none such.
    """
    shape = shape or {}
    set_classes(facts, shape)
    try:
        with torch.device("meta"), _Unfilled():
            model: PreTrainedModel = auto_class(shape).from_config(
                facts,
                dtype=dtype,
                trust_remote_code=section.trust_remote_code,
                **attention_option(section),
            )
    except Exception as error:
        if is_bug(error):
            raise
        said = unknown_to_transformers(section, shape, error) or attention_problem(section, error)
        raise UserError(said or f"{section.label} cannot be planned ({error}): name a language model") from error
    if "class_names" in shape:
        note_new_modules(model, section)
    model.config.use_cache = False
    return model


_Call = Callable[..., object]
_Named = dict[str, object]


class _Unfilled(TorchFunctionMode):
    """Leaves out first values, which take half of the time that it takes to make a model and which meta has not."""

    def __torch_function__(
        self, func: _Call, types: object, args: tuple[object, ...] = (), kwargs: _Named | None = None
    ) -> object:
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else (kwargs or {})["tensor"]
        return func(*args, **(kwargs or {}))


def _from_file(section: ModelConfig) -> PreTrainedConfig:
    path = Path(section.path or "").expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"model.path={section.path} has no config.json: name such a file or a folder in hub layout")
    if section.trust_remote_code:
        known: PreTrainedConfig = AutoConfig.from_pretrained(str(file.parent), trust_remote_code=True)
        return known
    try:
        facts = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is not valid JSON ({error}): copy it anew") from error
    return _from_facts(facts, str(file))


def _from_facts(facts: dict[str, object], where: str) -> PreTrainedConfig:
    facts.pop("quantization_config", None)  # the run's own quantisation counts
    kind = str(facts.pop("model_type", ""))
    try:
        known: PreTrainedConfig = AutoConfig.for_model(kind, **facts)
        return known
    except Exception as error:  # what transformers raises for facts that contradict each other is of any class
        if is_bug(error):
            raise
        reason = re.sub(r"\s+", " ", str(error))[:300]
        raise UserError(f"{where}: transformers cannot read this architecture ({reason})") from error
