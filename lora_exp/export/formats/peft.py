"""The adapter alone, in the folder that PEFT, transformers (``load_adapter``) and vLLM read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.export.format import Format, Tolerance, Wish, export_format
from lora_exp.use_config import ExportConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from lora_exp.adapters import LoraModel

_CLASSES = "config.json"  # what a head's outputs stand for
_VLLM = "https://docs.vllm.ai/en/latest/features/lora.html"


@export_format("peft")
class Peft(Format):
    runtime = "PEFT on the base"
    needs: ClassVar[tuple[str, ...]] = ("peft",)
    extra = "peft"
    needs_base = True
    library = "peft"
    tags: ClassVar[tuple[str, ...]] = ("lora",)

    def problems(self, config: Config) -> list[str]:
        if config.adapter.is_added:
            return []
        return [
            f"export=peft is an adapter, and adapter={config.adapter.name} trained the base itself: use export=merged"
        ]

    def check(self, wish: Wish) -> None:
        if reason := refusal(_adapted(wish), wish.name):
            raise UserError(f"export=peft: PEFT cannot hold this adapter ({reason}): use export=merged")

    def needed_bytes(self, wish: Wish) -> int:
        tensors = _adapted(wish).adapter_tensors(wish.name).values()
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + 20_000_000  # a tokenizer

    def write(self, wish: Wish, folder: Path) -> Mapping[str, object]:
        from lora_exp.export.tokenizing import exported_tokenizer

        trained, run = wish.trained, wish.trained.runs[wish.name]
        _adapted(wish).save_pretrained(folder, wish.name, base_files_sha256=trained.digest)
        if (tokenizer := exported_tokenizer(trained)) is not None:
            tokenizer.save_pretrained(folder)
        if (run.adapter / _CLASSES).is_file():
            shutil.copyfile(run.adapter / _CLASSES, folder / _CLASSES)
        problems = vllm_problems(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")))
        return {"vllm": "; ".join(problems) or "reads it"}

    def usage(self, wish: Wish, folder: str) -> str:
        name = wish.trained.config.model.path or wish.trained.config.model.name
        rank = _adapted(wish).configs[wish.name].rank
        return (
            f"On {name}:\n\n```python\nfrom peft import PeftModel\n\n"
            f'model = PeftModel.from_pretrained(base, "{folder}")\n```\n\n'
            f'Also `base.load_adapter("{folder}")` of transformers, `LoraModel.from_pretrained(base, "{folder}")` of '
            f"lora_exp, and `vllm serve {name} --enable-lora --max-lora-rank {rank} --lora-modules NAME={folder}` "
            f"([vLLM]({_VLLM}) takes neither DoRA nor saved modules)."
        )

    def tolerance(self, section: ExportConfig) -> Tolerance:
        return Tolerance(1e-3, 1e-6)

    def logits(self, folder: Path, tokens: Tensor, base: Path | None) -> Tensor:
        import warnings

        import peft

        from lora_exp.export.answers import logits_of

        assert base is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = peft.PeftModel.from_pretrained(_base(folder, base, tokens), str(folder))
        return logits_of(model.eval(), tokens)


def refusal(model: LoraModel, name: str) -> str | None:
    """Why PEFT's format cannot hold an adapter; None if it can."""
    from lora_exp.adapters.inspection.traversal import lora_layers
    from lora_exp.adapters.variants.registry import variant_named

    config = model.configs[name]
    hosts = [layer for _, layer in lora_layers(model.wrapped) if name in layer.adapters]
    return variant_named(config.variant).peft_format.refusal(config, hosts)


def _adapted(wish: Wish) -> LoraModel:
    from lora_exp.adapters import LoraModel

    if not isinstance(wish.trained.model, LoraModel):
        raise UserError("export=peft is an adapter, and this run trained the base itself: use export=merged")
    return wish.trained.model


def vllm_problems(facts: Mapping[str, object]) -> list[str]:
    """What of an adapter's config vLLM does not take (its ``PEFTHelper``, and only linear layers and embeddings)."""
    found = []
    if facts.get("peft_type") != "LORA":
        found.append(f"vLLM reads LORA, not {facts.get('peft_type')}")
    if facts.get("use_dora"):
        found.append("vLLM has no DoRA")
    if facts.get("modules_to_save"):
        found.append("vLLM takes no modules_to_save")
    if facts.get("bias") not in (None, "none"):
        found.append("vLLM takes no trained biases")
    if facts.get("target_parameters"):
        found.append("vLLM takes no target_parameters")
    return found


def _base(folder: Path, base: Path, tokens: Tensor) -> nn.Module:
    """As the adapter was trained on it: quantised bases in the same bits, others by plain transformers."""
    from omegaconf import OmegaConf

    from lora_exp import models
    from lora_exp.config import ModelConfig, QuantizationConfig
    from lora_exp.data import kind_of
    from lora_exp.export.provenance import read_provenance
    from lora_exp.machine.place import resolve_place
    from lora_exp.models.source import Source
    from lora_exp.schema import data_section
    from lora_exp.use.loading import shape_in

    facts = read_provenance(folder)
    config = facts["config"]
    section = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), config["model"]))
    quantization = QuantizationConfig(**facts["quantization"])
    assert isinstance(section, ModelConfig)
    section.path, section.packaged = str(base), None
    place = resolve_place(str(tokens.device), facts["computed_in"], False, quantization.name != "none")
    kind = kind_of(data_section(OmegaConf.create(config["data"])))
    return models.load_base(Source(str(base)), section, place, shape_in(folder, kind), quantization).eval()
