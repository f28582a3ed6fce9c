"""The base with what was trained inside of it, as a Hugging Face folder that plain transformers loads."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.export.format import Format, Tolerance, Wish, export_format
from lora_exp.models.kind import model_kind_of, model_kinds
from lora_exp.use_config import ExportConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from lora_exp.export.merging import MergedModel

DTYPES = ("auto", "float32", "float16", "bfloat16")
QUANTISE = ("none", "nf4", "fp4", "int8")
# Products in another order; 11 and 8 bits of mantissa; 8 and 4 bits a weight, where unlikely entries' logits, which
# mean nothing, move by several units: there it is the KL that tells.
_TOLERANCE = {
    "float32": Tolerance(1e-3, 1e-6),
    "float16": Tolerance(0.1, 2e-5),
    "bfloat16": Tolerance(1.0, 2e-3),
    "int8": Tolerance(20.0, 0.2),
    "nf4": Tolerance(50.0, 1.5),
    "fp4": Tolerance(50.0, 2.0),
}
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@export_format("merged")
class Merged(Format):
    runtime = "plain transformers"
    tags: ClassVar[tuple[str, ...]] = ("lora", "merged")

    def problems(self, config: Config) -> list[str]:
        section, found = config.export, []
        for name, choices in (("dtype", DTYPES), ("quantise", QUANTISE)):
            if getattr(section, name) not in choices:
                listed = ", ".join(choices)
                found.append(f"export.{name}={getattr(section, name)} is not known: choose one of {listed}")
        absent = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
        if section.quantise in QUANTISE[1:] and absent:
            found.append(
                f"export.quantise={section.quantise}: {' and '.join(absent)} not installed: "
                "pip install 'lora_exp[qlora]'"
            )
        return [*found, *_kind_problems(config)]

    def check(self, wish: Wish) -> None:
        if wish.section.quantise != "none" and not model_kind_of(wish.trained.config.model).quantises:
            raise UserError(f"export.quantise={wish.section.quantise} is for language models: use export.quantise=none")

    def resolved(self, wish: Wish) -> ExportConfig:
        if wish.section.dtype != "auto":
            return wish.section
        from lora_exp.export.merging import stored_dtype
        from lora_exp.models.source import weight_files

        trained = wish.trained
        own = str(stored_dtype(weight_files(trained.model, trained.source))).removeprefix("torch.")
        return replace(wish.section, dtype=own)

    def needed_bytes(self, wish: Wish) -> int:
        count = _parameters(wish.trained.model)
        dense = count * _BYTES[wish.section.dtype]
        if wish.section.quantise == "none":
            return dense
        from lora_exp.export.merging import QUANTISED

        return dense + int(count * QUANTISED[wish.section.quantise])  # the dense one lies there meanwhile

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object]:
        import torch

        from lora_exp.adapters import LoraModel
        from lora_exp.export import merging
        from lora_exp.export.tokenizing import exported_tokenizer

        trained, section = wish.trained, wish.section
        dtype: torch.dtype = getattr(torch, section.dtype)
        quantised = section.quantise if section.quantise != "none" else None
        facts: dict[str, object] = {"stored_in": quantised or section.dtype}
        if (tokenizer := exported_tokenizer(trained)) is not None:
            tokenizer.save_pretrained(folder)
        if isinstance(trained.model, LoraModel):
            found = merging.merged_model(trained.model, wish.name, dtype, keep=quantised is not None)
            return {**facts, "merging": vars(found.rounding), **_stored(wish, found, quantised, folder)}
        with trained.using(wish.name) as model:
            merging.cast_parameters(model, dtype)
            return {**facts, **_stored(wish, merging.MergedModel(model), quantised, folder)}

    def usage(self, wish: Wish, folder: str) -> str:
        from lora_exp.data import kind_of

        auto = (
            "AutoModelForSequenceClassification"
            if kind_of(wish.trained.config.data).new_head
            else "AutoModelForCausalLM"
        )
        return (
            "It needs neither lora_exp nor PEFT:\n\n```python\n"
            f"from transformers import AutoTokenizer, {auto}\n\n"
            f'tokenizer = AutoTokenizer.from_pretrained("{folder}")\n'
            f'model = {auto}.from_pretrained("{folder}", dtype="auto")\n```'
        )

    def tolerance(self, section: ExportConfig) -> Tolerance:
        key = section.quantise if section.quantise != "none" else section.dtype
        return _TOLERANCE["bfloat16" if key == "auto" else key]

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        from lora_exp.export.answers import logits_of, plain_model

        return logits_of(plain_model(folder, tokens.device), tokens)


def _stored(wish: Wish, found: MergedModel, quantised: str | None, folder: Path) -> dict[str, object]:
    from lora_exp.export import merging

    config = getattr(found.model, "config", None)
    if config is not None:
        config._name_or_path = ""  # it is no copy of its base
    if quantised is None:
        merging.save_plain(found.model, folder, wish.section.shard_gb)
        return {}
    device = str(wish.trained.place.device)
    return {"quantising": vars(merging.save_quantised(found, quantised, folder, wish.section.shard_gb, device))}


def _kind_problems(config: Config) -> list[str]:
    """Of a kind that transformers does not load there is no such folder."""
    model = config.model
    if model_kinds.problem(model.kind) or model_kind_of(model).is_transformers:
        return []
    return [
        f"export={config.export.format} writes folders that transformers loads, and model={model.label} ({model.kind}) "
        "is none of its architectures: use export=peft, or LoraModel.save_model(FILE, merge_weights=True) from Python"
    ]


def _parameters(model: nn.Module) -> int:
    from lora_exp.adapters import LoraModel
    from lora_exp.adapters.inspection.parameter_counts import count_parameters

    if isinstance(model, LoraModel):
        return model.parameter_counts()[1]
    return count_parameters(model.parameters(), ())[0]
