"""What a kind of model is: how its packaged file is unpacked, and how it is loaded, looked at and planned.

A file says ``@model_kind("name")`` above a class that follows ``ModelKind``; ``model.kind=name`` then chooses it.
Its file is imported to look at a config, so that what takes long to import is imported inside its methods.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.errors import UserError
from lora_exp.registry import Registry

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lora_exp.machine.place import Place
    from lora_exp.models.source import Source

Shape = Mapping[str, Any]  # what the data asks of a model, by name: such as its classes, the length of its rows
Outline = Callable[["torch.dtype"], "nn.Module"]


class ModelKind:
    """``quantises``: whether its weights can be stored quantised. ``planned_early``: whether a plan of it reads no
    data, so that a look before training costs little. ``tokenises``: whether it has a tokenizer; ``is_transformers``:
    whether transformers loads its folder by itself, without this package."""

    quantises: ClassVar[bool] = False
    planned_early: ClassVar[bool] = False
    tokenises: ClassVar[bool] = False
    is_transformers: ClassVar[bool] = False

    def problems(self, section: ModelConfig, positions: int | None, length_field: str) -> list[str]:
        """What can be seen to be wrong with rows of as many ``positions`` (None: they are not of that sort), as many as
        ``data.LENGTH_FIELD`` says."""
        return []

    def convert(self, packaged: Path, folder: Path) -> None:
        """The packaged file → ``folder`` in hub layout, with safetensors."""
        raise NotImplementedError

    def load(
        self, source: Source, section: ModelConfig, place: Place, shape: Shape, quantization: QuantizationConfig
    ) -> nn.Module:
        """The model on ``place``, with what the data asks of its ``shape``. Raises UserError if it cannot be had."""
        raise NotImplementedError

    def load_tokenizer(self, source: Source, section: ModelConfig) -> PreTrainedTokenizerBase:
        raise UserError(f"model={section.label or section.name} ({section.kind}) has no tokenizer: choose other data")

    def outline(self, section: ModelConfig, positions: int | None, shape: Callable[[], Shape]) -> Outline:
        """What makes the model on the meta device in a given dtype; ``shape()`` reads the data for it."""
        raise UserError(f"model={section.label or section.name} ({section.kind}) cannot be planned: train it")


model_kinds: Registry[type[ModelKind]] = Registry("model.kind", "lora_exp.models.kinds")
model_kind = model_kinds.add


def model_kind_of(section: ModelConfig) -> ModelKind:
    """Raises UserError for a kind that there is not."""
    return model_kinds[section.kind]()
