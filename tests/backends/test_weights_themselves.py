"""adapter=full and adapter=head: exactly the wished weights train, tied or not, and what is saved gives them back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from lora_exp.backends import adapt
from lora_exp.config import Config, conf_folder
from lora_exp.schema import register, to_config

register()
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29, "intermediate_size": 24}


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", ["adapter=full", "model=hf", "model.path=somewhere", *overrides]))


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, num_key_value_heads=1, tie_word_embeddings=tied)).eval()


def bert(tied: bool) -> Any:
    torch.manual_seed(0)
    return hf.BertForMaskedLM(hf.BertConfig(**SMALL, tie_word_embeddings=tied)).eval()


def gpt2(tied: bool) -> Any:
    torch.manual_seed(0)
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, tie_word_embeddings=tied)
    ).eval()


def t5(tied: bool) -> Any:
    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 29}
    made = hf.T5Config(**sizes, dropout_rate=0.0, decoder_start_token_id=0, tie_word_embeddings=tied)
    return hf.T5ForConditionalGeneration(made).eval()


WISHES = [
    (llama, "[lm_head]"), (llama, "[embed_tokens]"), (llama, "[lm_head,embed_tokens]"), (llama, "[self_attn]"),
    (llama, "[layers.1]"), (llama, "[q_proj,norm]"), (llama, "'lm_head|.*layers\\.0\\.mlp'"), (llama, "[model]"),
    (bert, "[decoder]"), (bert, "[word_embeddings]"), (bert, "[predictions]"), (bert, "[embeddings]"), (bert, "[cls]"),
    (t5, "[embed_tokens]"), (t5, "[shared]"), (t5, "[lm_head]"), (t5, "[decoder]"),
    (gpt2, "[lm_head]"), (gpt2, "[wte]"), (gpt2, "[h.1]"), (gpt2, "[ln_f,c_attn]"),
]  # fmt: skip


def wished(model: Any, targets: str) -> set[int]:
    """By hand: every parameter below a module of that name."""
    import re

    names = [name for name, _ in model.named_modules(remove_duplicate=False)]
    if targets.startswith("'"):
        hits = {name for name in names if re.fullmatch(targets.strip("'"), name)}
    else:
        entries = targets.strip("[]").split(",")
        hits = {name for name in names for entry in entries if f".{name}".endswith(f".{entry}")}
    return {id(p) for name in hits for p in model.get_submodule(name).parameters()}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("make", "targets"), WISHES)
def test_exactly_the_wished_weights_train_and_come_back(
    make: Callable[[bool], Any], targets: str, tied: bool, tmp_path: Path
) -> None:
    model, tokens = make(tied), torch.arange(3, 15)[None]
    expected = wished(model, targets)
    assert expected
    adapted = adapt(model, config(f"targets={targets}"))
    assert {id(p) for p in adapted.parameters} == expected
    assert len(adapted.parameters) == len(expected)  # each once: an optimizer refuses repeats
    assert {id(p) for p in model.parameters() if p.requires_grad} == expected
    assert adapted.trainable == sum(p.numel() for p in adapted.parameters)
    before = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in adapted.parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == (id(parameter) not in expected)
    adapted.save(tmp_path)
    fresh = make(tied)
    (file,) = tmp_path.glob("*.safetensors")
    result = fresh.load_state_dict(load_file(file), strict=False)
    assert not result.unexpected_keys
    inputs = {"input_ids": tokens, **({"labels": tokens} if make is t5 else {})}
    torch.testing.assert_close(fresh(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_tied_head_alone_trains(tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = llama(tied)
    with caplog.at_level("INFO"):
        adapted = adapt(model, config("adapter=head", "model.modules_to_save=[lm_head]"))
    assert [p is model.lm_head.weight for p in adapted.parameters] == [True]
    model(torch.arange(3, 15)[None]).logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    assert ("lm_head.weight is also model.embed_tokens.weight" in caplog.text) == tied


def test_all_linear_means_linear_layers_here_too() -> None:
    model = llama(True)
    adapted = adapt(model, config("targets=all-linear"))
    linear = {id(m.weight) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    assert {id(p) for p in adapted.parameters} == linear


def test_targets_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"targets.*nothing"):
        adapt(llama(True), config("targets=[nothing]"))
    with pytest.raises(ValueError, match=r"targets.*act_fn.*no weights"):
        adapt(llama(True), config("targets=[act_fn]"))
