"""Merged SmolLM2, whose embedding is its head, in plain transformers against the adapted one, in float32.

float32 itself is uncertain by 5e-5 to 7e-5 there, as the same model in float64 shows; updates are of a size at which
logits move by up to 7.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoModelForCausalLM

from lora_exp.adapters.variants.registry import variant_names
from lora_exp.config import ModelConfig, QuantizationConfig, conf_folder
from lora_exp.export.merging import merged_model, save_plain
from lora_exp.machine.place import Place
from lora_exp.models import find_source, load_base, load_tokenizer

pytestmark = pytest.mark.slow
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "all": {"target_modules": [*LINEAR, "embed_tokens"], "use_rslora": True},
    "dora on all": {"target_modules": [*LINEAR, "embed_tokens"], "variant": "dora"},
    "head": {"target_modules": ["lm_head"]},
    **{f"{name} on linear": {"target_modules": LINEAR, "variant": name} for name in variant_names()},
}


def section() -> ModelConfig:
    named = OmegaConf.load(conf_folder() / "model/smollm2_135m.yaml")
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), named))
    assert isinstance(found, ModelConfig)
    return found


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    tokenizer = load_tokenizer(find_source(section()), section())
    text = "In the beginning God created the heaven and the earth. And the earth was without form, and void."
    return torch.tensor([tokenizer(text)["input_ids"][:16]])


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_adapt(way: str, tokens: torch.Tensor, adapted: Any, answers: Any, tmp_path: Path) -> None:
    assert difference("none", WAYS[way], tokens, adapted, answers, tmp_path) <= 1e-4


@pytest.mark.parametrize("way", ["lora on linear", "dora on linear", "all"])
def test_adapters_trained_on_nf4(way: str, tokens: torch.Tensor, adapted: Any, answers: Any, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    assert difference("nf4", WAYS[way], tokens, adapted, answers, tmp_path) <= 1e-4


def difference(
    bits: str, way: dict[str, Any], tokens: torch.Tensor, adapted: Callable[..., Any], answers: Any, folder: Path
) -> float:
    place, source = Place(torch.device("cpu"), torch.float32), find_source(section())
    model = adapted(load_base(source, section(), place, None, QuantizationConfig(bits)), std=0.003, **way)
    expected = answers(model, tokens)
    with model.disable_adapter():
        assert (answers(model, tokens) - expected).abs().max() > 0.02
    save_plain(merged_model(model, "default", torch.float32).model, folder, 5.0)
    read = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return float((answers(read, tokens) - expected).abs().max())
