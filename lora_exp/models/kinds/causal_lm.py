"""Causal language models of transformers; for data of classes with a head for them in place of the vocabulary's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora_exp.config import ModelConfig, QuantizationConfig
from lora_exp.inputs import architecture_facts
from lora_exp.models.kind import ModelKind, Outline, Shape, model_kind
from lora_exp.models.positions import length_problem

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from lora_exp.machine.place import Place
    from lora_exp.models.source import Source


@model_kind("causal_lm")
class CausalLM(ModelKind):
    quantises: ClassVar[bool] = True
    planned_early: ClassVar[bool] = True
    tokenises: ClassVar[bool] = True
    is_transformers: ClassVar[bool] = True

    def problems(self, section: ModelConfig, positions: int | None, length_field: str) -> list[str]:
        if positions is None:
            return []
        label = section.label or section.name
        problem = length_problem(architecture_facts(section), positions, label, length_field)
        return [problem] if problem else []

    def convert(self, packaged: Path, folder: Path) -> None:
        from lora_exp.models import causal_lm

        causal_lm.convert(packaged, folder)

    def load(
        self, source: Source, section: ModelConfig, place: Place, shape: Shape, quantization: QuantizationConfig
    ) -> nn.Module:
        from lora_exp.models import causal_lm

        return causal_lm.load(source, section, place, shape, quantization)

    def load_tokenizer(self, source: Source, section: ModelConfig) -> PreTrainedTokenizerBase:
        from lora_exp.models import causal_lm

        return causal_lm.load_tokenizer(source, section)

    def outline(self, section: ModelConfig, positions: int | None, shape: Callable[[], Shape]) -> Outline:
        from lora_exp.models import unloaded

        return unloaded.outline(section, positions, shape())
