"""A base on the meta device as training would load it, and what of it is stored quantised."""

from __future__ import annotations

import transformers
from torch import nn

from lora_exp.adapters.surgery.targets import matching
from lora_exp.config import DataConfig, ModelConfig, QuantizationConfig
from lora_exp.data import kind_of
from lora_exp.models.heads import new_modules
from lora_exp.models.kind import Outline, model_kind_of


def outline_of(section: ModelConfig, data: DataConfig) -> Outline:
    """What makes a new model on the meta device, in a given dtype, as training would load it.

    Raises UserError for facts, a package or data that cannot be had.
    """
    positions = kind_of(data).positions
    return model_kind_of(section).outline(section, positions, kind_of(data).plan_shape)


def quantised_names(model: nn.Module, section: QuantizationConfig) -> set[str]:
    """The weights, by parameter name, that are stored quantised: those of linear layers that are not skipped."""
    if section.name == "none":
        return set()
    ask = getattr(model, "get_output_embeddings", None)
    head, modules = ask() if callable(ask) else None, dict(model.named_modules())
    skipped = matching(section.skip_modules, modules, "quantization.skip_modules") if section.skip_modules else set()
    new = tuple(new_modules(model))
    chosen = set()
    for name, module in modules.items():
        if not isinstance(module, (nn.Linear, transformers.pytorch_utils.Conv1D)):
            continue
        if module is not head and name not in skipped and not name.startswith(new):
            chosen.add(f"{name}.weight")
    return chosen


def prepare_for_kbit(model: nn.Module, quantised: set[str]) -> None:
    """What is not quantised of a base (norms, embeddings, head) is float32, as in models/quantised.py."""
    for name, parameter in model.named_parameters():
        if name not in quantised:
            parameter.data = parameter.data.float()
