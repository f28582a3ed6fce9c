"""Frozen bases: one file a kind of model (``model.kind``) in ``kinds/``, and beside it how each kind is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import ModelConfig, PackagedConfig, QuantizationConfig
from lora_exp.errors import UserError, is_bug
from lora_exp.inputs import model_path_problem
from lora_exp.machine.cache import cache_folder, made_once, read_early, written_sha256
from lora_exp.machine.packaged import find_packaged, locate_packaged
from lora_exp.models.checkpointing import checkpoint_layers
from lora_exp.models.kind import model_kind_of
from lora_exp.models.source import Source, base_files_sha256, cannot_be_had

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lora_exp.machine.place import Place

__all__ = [
    "Source",
    "base_files_sha256",
    "checkpoint_layers",
    "find_source",
    "load_base",
    "load_tokenizer",
    "prepare_source",
    "unpacked",
    "with_new_modules",
]


def find_source(section: ModelConfig) -> Source:
    """``model.path`` if set, else the packaged file (converted once), else the hub's ``model.name``.

    Raises UserError for a path that is no model folder, or when nothing is left to try.
    """
    if section.path:
        if problem := model_path_problem(section.path):
            raise UserError(problem)
        return Source(str(Path(section.path).expanduser()), trust_remote_code=section.trust_remote_code)
    if section.packaged and locate_packaged(section.packaged):
        folder = unpacked(section)
        return Source(str(folder), digests=written_sha256(folder))
    return Source(section.name or "", section.revision, section.trust_remote_code)


def prepare_source(section: ModelConfig) -> None:
    """Begin what ``find_source`` will wait for, the reading of what was unpacked before; other work hides it."""
    with contextlib.suppress(ValueError, RuntimeError):  # no home for a cache, no room for a thread: said later
        if section.packaged and not section.path:
            read_early(_folder(section, section.packaged))


def unpacked(section: ModelConfig) -> Path:
    """The packaged file as a folder in hub layout with safetensors, made once in the cache.

    The packaged file itself is read, and checked, only to make that.
    """
    packaged = section.packaged
    assert packaged is not None

    def convert(temporary: Path) -> None:
        file = find_packaged(packaged)
        assert file is not None
        try:
            model_kind_of(section).convert(file, temporary)
        except Exception as error:
            if isinstance(error, OSError) or is_bug(error):  # the first are about the cache
                raise
            raise UserError(cannot_be_had(section, error)) from error

    return made_once(_folder(section, packaged), convert)


def load_tokenizer(source: Source, section: ModelConfig) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises UserError naming every way to get the model when it cannot be had."""
    return model_kind_of(section).load_tokenizer(source, section)


def load_base(
    source: Source,
    section: ModelConfig,
    place: Place,
    shape: Mapping[str, Any] | None = None,
    quantization: QuantizationConfig | None = None,
) -> nn.Module:
    """The model on ``place``, in its dtype, with what the data asks of its ``shape`` (how many classes, say).

    ``quantization``: how its weights are stored; None is in that dtype.

    Raises UserError when it cannot be had.
    """
    stored = quantization or QuantizationConfig("none")
    return model_kind_of(section).load(source, section, place, shape or {}, stored)


def with_new_modules(section: ModelConfig, base: nn.Module) -> ModelConfig:
    """The section with what is new in ``base``, its head, among the modules that are trained in full."""
    from lora_exp.models.heads import new_modules

    return replace(section, modules_to_save=list(dict.fromkeys([*section.modules_to_save, *new_modules(base)])))


def _folder(section: ModelConfig, packaged: PackagedConfig) -> Path:
    return cache_folder("models", section.label, packaged.sha256[:12], section.cache_dir)
