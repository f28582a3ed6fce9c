"""Every family of causal language model that fits a test: loaded, adapted, trained for a step and planned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lora_exp.backends import adapt
from lora_exp.config import (
    AdapterConfig,
    Config,
    LayerConfig,
    ModelConfig,
    OptimizerConfig,
    QuantizationConfig,
    ScalingConfig,
)
from lora_exp.data.kinds.text import Text
from lora_exp.data.text import collate_blocks
from lora_exp.machine.place import Place
from lora_exp.models import find_source, load_base
from lora_exp.models.positions import most_positions, trained_positions
from lora_exp.plan.estimate import Planner
from lora_exp.training.objectives import causal_lm_losses

CPU = Place(torch.device("cpu"), torch.float32)
POSITIONS = 24
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}
_LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA |= {"num_key_value_heads": 2, "max_position_embeddings": POSITIONS}
_BERT = {key: value for key, value in _LLAMA.items() if key != "num_key_value_heads"} | {"is_decoder": True}
_BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48, "encoder_layers": 2}
_BART |= {"encoder_attention_heads": 4, "encoder_ffn_dim": 48, "max_position_embeddings": POSITIONS}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA | {"num_local_experts": 2},
    "qwen2": _LLAMA,
    "qwen3_moe": _LLAMA | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 48, "head_dim": 8},
    "qwen3": _LLAMA | {"head_dim": 8},
    "gemma2": _LLAMA | {"head_dim": 8},
    "gemma3_text": _LLAMA | {"head_dim": 8},
    "olmo2": _LLAMA,
    "stablelm": _LLAMA,
    "phi": _LLAMA,
    "gpt_neox": _BERT,
    "gpt_oss": _LLAMA | {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8},
    "falcon": {key: value for key, value in _LLAMA.items() if key != "intermediate_size"},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": POSITIONS},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "max_position_embeddings": POSITIONS},
    "gpt2": _GPT,
    "gpt_bigcode": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "codegen": _GPT | {"rotary_dim": 4},
    "openai-gpt": _GPT,
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, "dff": 48},
    "gpt_neo": _BERT | {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "opt": _BERT | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "biogpt": _BERT,
    "bart": _BART,
    "bert": _BERT,
    "roberta": _BERT | {"pad_token_id": 1},
}
WITHOUT_SDPA = {"gemma2", "bloom", "mpt", "mamba", "xglm", "gptj", "codegen", "openai-gpt", "gpt_neo", "gpt_oss"}
# Where not every linear layer is called: Mamba reads some weights alone, BART's cross-attention has nothing to look at.
TARGETS = {"mamba": ["in_proj"], "bart": ["fc1", "fc2"]}


def facts(kind: str) -> Any:
    return AutoConfig.for_model(kind, **FAMILIES[kind], vocab_size=97, bos_token_id=1, eos_token_id=2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A random model of a kind in hub layout, made when it is first asked for."""
    root = tmp_path_factory.mktemp("families")

    def folder(kind: str) -> Path:
        if not (root / kind).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(facts(kind)).save_pretrained(root / kind)
        return root / kind

    return folder


def config(folder: Path, kind: str, **model: Any) -> Config:
    return Config(
        layer=LayerConfig("linear", ["linear"]),
        adapter=AdapterConfig("lora", "lora"),
        scaling=ScalingConfig("rslora"),
        quantization=QuantizationConfig("none"),
        optimizer=OptimizerConfig("adamw"),
        model=ModelConfig(label=kind, path=str(folder), **model),
        data=Text(label="text", path="x.txt", block_size=16),
        targets=TARGETS.get(kind, "all-linear"),
        rank=2,
        device="cpu",
    )


def blocks(length: int) -> Any:
    generator = torch.Generator().manual_seed(0)
    return collate_blocks([{"input_ids": torch.randint(3, 97, (length,), generator=generator)} for _ in range(2)])


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind != "falcon"])  # its layers cannot be adapted
def test_it_loads_trains_and_plans(kind: str, folders: Any, caplog: pytest.LogCaptureFixture) -> None:
    wanted = config(folders(kind), kind)
    with caplog.at_level("INFO"):
        base = load_base(find_source(wanted.model), wanted.model, CPU, {"block_size": 16})
    assert ("has no sdpa: model.attention=eager" in caplog.text) == (kind in WITHOUT_SDPA)
    adapted = adapt(base, wanted)
    losses = causal_lm_losses(adapted.model, blocks(16))
    (losses.total.sum() / losses.count.sum()).backward()
    assert all(parameter.grad is not None for parameter in adapted.parameters)
    assert Planner(wanted).plan().trainable == adapted.trainable


@pytest.mark.parametrize("kind", ["bloom", "gemma2"])
def test_sdpa_where_it_is_not_names_eager(kind: str, folders: Any) -> None:
    wanted = config(folders(kind), kind, attention="sdpa")
    for attempt in (
        lambda: load_base(find_source(wanted.model), wanted.model, CPU),
        lambda: Planner(wanted).plan(),
    ):
        with pytest.raises(ValueError, match=rf"model.attention=sdpa is not for {kind} .*model.attention=eager"):
            attempt()


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in ("bloom", "mpt", "mamba")])
def test_blocks_are_refused_from_the_length_on_at_which_the_model_fails(
    kind: str, folders: Any, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = config(folders(kind), kind)
    known = facts(kind).to_dict()
    assert trained_positions(known) == POSITIONS
    most = most_positions(known)
    model = AutoModelForCausalLM.from_pretrained(folders(kind)).eval()
    model.config.use_cache = False
    with torch.no_grad():
        model(blocks(most or POSITIONS)["input_ids"])
        if most is None:
            model(blocks(POSITIONS + 1)["input_ids"])
            load_base(find_source(wanted.model), wanted.model, CPU, {"block_size": POSITIONS + 1})
            assert f"more than the {POSITIONS} positions that {kind} was trained on" in caplog.text
            return
        with pytest.raises((IndexError, RuntimeError)):
            model(blocks(most + 1)["input_ids"])
    with pytest.raises(ValueError, match=rf"data.block_size={most + 1} is more than the {most} positions"):
        load_base(find_source(wanted.model), wanted.model, CPU, {"block_size": most + 1})
    wanted.data.block_size = most + 1
    with pytest.raises(ValueError, match=rf"more than the {most} positions of model={kind}: set it to {most} or less"):
        Planner(wanted)
