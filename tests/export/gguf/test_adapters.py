"""Adapters of every sort in a GGUF: merged into it, or as a GGUF LoRA on the base's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.errors import UserError
from lora_exp.export.gguf.lora import alpha_of, pairs_of, write_lora
from lora_exp.export.gguf.model import merged, write_model

Make = Callable[..., nn.Module]
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model: nn.Module, **options: Any) -> LoraModel:
    """The model with an adapter whose every tensor is random, so that it changes the answers."""
    torch.manual_seed(3)
    made = LoraModel(
        model, LoraConfig(**{"target_modules": LINEAR, "rank": 4, "lora_alpha": 8, **options}), "one", False
    )
    with torch.no_grad():
        for parameter in made.adapter_parameters("one").values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return made.eval()


@torch.no_grad()
def answers(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    return model(rows).logits.log_softmax(-1)


def gap(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference of log-probabilities that are not tiny."""
    likely = one > -15
    return float((one - other)[likely].abs().max())


MERGED = {
    "lora": {},
    "rslora": {"use_rslora": True, "rank": 16},
    "dora": {"use_dora": True},
    "vera": {"variant": "vera"},
    "lora_fa": {"variant": "lora_fa"},
    "pissa": {"start": "pissa"},
    "biases": {"bias": "all"},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"up_proj": 1.0}},
    "embedding": {"target_modules": ["embed_tokens"], "layer_types": ("embedding",)},
    "all": {"target_modules": None, "layer_types": "all"},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "saved head": {"modules_to_save": ["lm_head"]},
    "saved norm": {"modules_to_save": ["input_layernorm"]},
}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("case", MERGED)
def test_merged(
    case: str, tied: bool, tiny: Make, rows: torch.Tensor, written: Callable[..., Path], llama_cpp: Callable[..., Any]
) -> None:
    base = tiny("llama", tie_word_embeddings=tied, attention_bias=True)
    before = answers(base, rows)
    model = adapted(base, **MERGED[case])
    expected = answers(model, rows)
    assert gap(before, expected) > 0.05
    path = written(model, adapter="one")
    assert gap(expected, llama_cpp(path, rows).log_probabilities) < 2e-3
    assert torch.equal(expected, answers(model, rows)), "the model is left as it was"
    names = [tensor.name for tensor in gguf.GGUFReader(path).tensors]
    assert ("output.weight" in names) == (not tied or case in ("embedding", "all", "head", "saved head"))


def test_what_gemma_has_once_stays_one(tiny: Make, written: Callable[..., Path]) -> None:
    model = adapted(tiny("gemma", head_dim=16), target_modules=["lm_head"])
    with pytest.raises(UserError, match="one weight for both"):
        written(model, adapter="one")


LORA = {
    "standard, 4": {"use_rslora": False},
    "rslora, 4": {"use_rslora": True},
    "standard, 64": {"use_rslora": False, "rank": 64},
    "rslora, 64": {"use_rslora": True, "rank": 64},
    "patterns": {"rank_pattern": {"q_proj": 8, "1.mlp.down_proj": 2}, "alpha_pattern": {"up_proj": 1.0}},
    "vera": {"variant": "vera"},
    "lora_fa": {"variant": "lora_fa"},
    "pissa": {"start": "pissa"},
    "olora": {"start": "olora", "use_rslora": False},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"], "layer_types": ("linear", "embedding")},
    "head": {"target_modules": ["lm_head", "k_proj"]},
    "one block": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("case", LORA)
def test_base_and_lora_are_the_merged_model(
    case: str, family: str, tiny: Make, rows: torch.Tensor, written: Callable[..., Path], tmp_path: Path,
    llama_cpp: Callable[..., Any],
) -> None:  # fmt: skip
    base = tiny(family, head_dim=16)
    base_file, before = written(base), answers(base, rows)
    model = adapted(base, **LORA[case])
    expected = answers(model, rows)
    assert gap(before, expected) > 0.05
    lora = tmp_path / "lora.gguf"
    write_lora(lora, model.wrapped, pairs_of(model, "one"), "f32")
    beside = llama_cpp(base_file, rows, lora=lora).log_probabilities
    inside = llama_cpp(written(model, adapter="one"), rows).log_probabilities
    assert gap(expected, beside) < 2e-3
    assert gap(inside, beside) < 2e-3


def test_alpha_is_such_that_the_runtime_has_our_scale(tiny: Make, tmp_path: Path) -> None:
    """alpha / r of llama.cpp for alpha / sqrt(r) of rsLoRA."""
    model = adapted(tiny("llama"), use_rslora=True, rank=64, lora_alpha=16)
    path = tmp_path / "lora.gguf"
    write_lora(path, model.wrapped, pairs_of(model, "one"), "f16")
    alpha = gguf.GGUFReader(path).fields["adapter.lora.alpha"].contents()
    assert alpha == pytest.approx(16 * math.sqrt(64))
    assert alpha / 64 == pytest.approx(model.configs["one"].scale)


def test_most_layers_keep_their_own_B(tiny: Make) -> None:
    model = adapted(tiny("llama"), alpha_pattern={"0.self_attn.q_proj": 2.0}, use_rslora=False)
    assert alpha_of(pairs_of(model, "one")) == 8


REFUSED = {
    "dora": ({"use_dora": True}, "DoRA's own parameters .magnitude."),
    "biases": ({"bias": "all"}, "trained biases"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules trained in full .lm_head"),
    "all of it": ({"bias": "all", "use_dora": True}, "DoRA.*; trained biases"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_lora_file_cannot_say(case: str, tiny: Make) -> None:
    options, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason) as refused:
        pairs_of(adapted(tiny("llama", attention_bias=True), **options), "one")
    assert "export=gguf" in str(refused.value)


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
def test_a_tied_end_is_refused(layer: str, tiny: Make) -> None:
    model = adapted(
        tiny("llama", tie_word_embeddings=True), target_modules=[layer], layer_types=("linear", "embedding")
    )
    with pytest.raises(UserError, match=f"{layer} is embedding and output head at once"):
        pairs_of(model, "one")


def test_no_adapter_no_lora(tiny: Make) -> None:
    with pytest.raises(UserError, match="trained the base's own weights"):
        pairs_of(tiny("llama"), "one")


@pytest.mark.parametrize("quantised", ["nf4", "int8"])
def test_a_quantised_base_is_dequantised(
    quantised: str, tiny: Make, rows: torch.Tensor, tmp_path: Path, tokenizer: Any, llama_cpp: Callable[..., Any]
) -> None:
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    tiny("llama").save_pretrained(tmp_path / "base")
    options = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"} if quantised == "nf4" else {"load_in_8bit": True}
    stored = BitsAndBytesConfig(**options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=stored, dtype=torch.float32)
    model = adapted(base)
    path = tmp_path / "merged.gguf"
    write_model(path, base, merged(model, "one"), tokenizer, "f32")
    expected = answers(model.merge_and_unload("one"), rows)  # int8 rounds its inputs as well, dequantised it does not
    assert gap(expected, llama_cpp(path, rows).log_probabilities) < 2e-3
