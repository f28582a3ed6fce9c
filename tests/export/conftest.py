"""Tiny models with an adapter as after training, and the folder that plain transformers loads of them."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.export.answers import logits_of

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def tiny_model(kind: str) -> nn.Module:
    """A random model of transformers."""
    import transformers as hf

    torch.manual_seed(0)
    if kind in ("llama", "tied llama"):
        more = {
            "intermediate_size": 48,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "attention_bias": True,
        }
        return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **more, tie_word_embeddings=kind == "tied llama"))
    if kind == "gpt2":
        drops = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=61, n_positions=64, **drops))
    if kind == "bert":
        return hf.BertForMaskedLM(hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64))
    if kind == "bert classifier":
        names = {0: "no", 1: "yes", 2: "maybe"}
        facts = hf.BertConfig(**SMALL, intermediate_size=48, max_position_embeddings=64, id2label=names)
        return hf.BertForSequenceClassification(facts)
    if kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": 61}
        return hf.T5ForConditionalGeneration(hf.T5Config(**sizes, decoder_start_token_id=0))
    if kind == "mixtral":
        more = {"intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 8}
        return hf.MixtralForCausalLM(hf.MixtralConfig(**SMALL, **more, num_local_experts=4, num_experts_per_tok=2))
    assert kind == "resnet"
    facts = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", id2label={0: "a", 1: "b", 2: "c"}
    )
    return hf.ResNetForImageClassification(facts)


def inputs_of(kind: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.rand(3, 3, 32, 32) if kind == "resnet" else torch.randint(3, 61, (3, 12))


@pytest.fixture
def model_of() -> Callable[[str], nn.Module]:
    return tiny_model


@pytest.fixture
def inputs_for() -> Callable[[str], torch.Tensor]:
    return inputs_of


def as_trained(model: nn.Module, std: float = 0.1, **config: Any) -> LoraModel:
    """``model`` with an adapter whose values differ from their first ones."""
    torch.manual_seed(2)
    adapted = LoraModel(model.eval(), LoraConfig(**{"rank": 4, **config}), verbose=False).eval()
    with torch.no_grad():
        for parameter in adapted.adapter_parameters().values():
            parameter.add_(std * torch.randn_like(parameter))
    return adapted


@pytest.fixture
def adapted() -> Callable[..., LoraModel]:
    return as_trained


@pytest.fixture
def answers() -> Callable[[nn.Module, torch.Tensor], torch.Tensor]:
    return logits_of


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    """The folders of those that are trained already, by what they were asked for; no test changes one."""
    return {}


@pytest.fixture
def finished(
    cli: Callable[..., Any], tiny_overrides: list[str], runs: dict[tuple[str, ...], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Path]:  # fmt: skip
    """Trains from the command line, each once; gives the run's folder, whose exports begin with ``day-run``."""

    def train(*more: str) -> Path:
        if more not in runs:
            folder = tmp_path_factory.mktemp("trained") / "day/run"
            done = cli(*tiny_overrides, "tracking=none", "optimizer.lr=2e-2", f"hydra.run.dir={folder}", *more)
            assert done.code == 0, done.err
            runs[more] = folder
        return runs[more]

    return train


def facts_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return found


@pytest.fixture
def provenance() -> Callable[[Path], dict[str, Any]]:
    return facts_in
