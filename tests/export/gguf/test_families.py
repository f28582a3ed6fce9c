"""Random models of each family: llama.cpp answers as transformers does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_exp.errors import UserError
from lora_exp.export.gguf.family import families, family_of

Make = Callable[..., nn.Module]
WINDOWED = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
MODELS = {
    "llama": ("llama", {}),
    "llama, biases, tied": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "llama, all heads": ("llama", {"num_key_value_heads": 4}),
    "llama, llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}),
    "llama, yarn": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": ("gemma2", WINDOWED),
    "gemma3": ("gemma3_text", {**WINDOWED, "num_hidden_layers": 7}),
    "gemma3, linear, untied": (
        "gemma3_text",
        {
            **WINDOWED, "num_hidden_layers": 7, "tie_word_embeddings": False, "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}  # fmt: skip


@torch.no_grad()
def answers(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """(N, T, V) log-probabilities of the next token by transformers."""
    return model(rows).logits.log_softmax(-1)


@pytest.mark.parametrize("case", MODELS)
def test_llama_cpp_answers_as_transformers(
    case: str, tiny: Make, rows: torch.Tensor, written: Callable[..., Path], llama_cpp: Callable[..., Any]
) -> None:
    kind, changes = MODELS[case]
    model = tiny(kind, **changes)
    expected = answers(model, rows)
    found = llama_cpp(written(model), rows).log_probabilities
    coarse = 10 if kind.startswith("gemma") else 1  # llama.cpp looks GELU up in a table of float16
    assert (expected.exp() - found.exp()).abs().max() < 1e-4 * coarse
    likely = expected > -15
    assert (expected - found)[likely].abs().max() < 2e-3 * coarse


REFUSED = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 1, "n_head": 2}, "GPT2LMHeadModel"),
    "activation": ("llama", {"hidden_act": "gelu"}, "activation is gelu"),
    "scaling": ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "dynamic"),
    "pattern": ("gemma2", {**WINDOWED, "layer_types": ["full_attention"] * 3}, "at each 2th place"),
    "scores": ("gemma3_text", {**WINDOWED, "query_pre_attn_scalar": 7}, "scaled by 7"),
    "biases": ("qwen3", {"attention_bias": True}, "has biases .attention_bias., and llama.cpp's qwen3 none"),
    "no positions": ("smollm3", {"no_rope_layers": [1, 0, 1]}, "each 4th"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_with_the_next_move(case: str, tiny: Make) -> None:
    kind, changes, reason = REFUSED[case]
    with pytest.raises(UserError, match=reason) as refused:
        family_of(tiny(kind, **changes))
    assert "convert_hf_to_gguf.py" in str(refused.value)


def test_a_classifier_is_refused() -> None:
    from transformers import AutoModelForSequenceClassification, LlamaConfig

    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with pytest.raises(UserError, match="next token, and this is LlamaForSequenceClassification"):
        family_of(AutoModelForSequenceClassification.from_config(config))


def test_each_family_is_tested(tiny: Make) -> None:
    tested = {type(tiny(kind, **changes)).__name__ for kind, changes in MODELS.values()}
    assert tested == set(families.names())
