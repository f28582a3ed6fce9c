"""What decays, against HF's Trainer."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lora_exp.config import OptimizerConfig
from lora_exp.training.optimizers import build_optimizer, undecayed

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama() -> torch.nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, intermediate_size=16, attention_bias=True))


def gpt2() -> torch.nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16))


@pytest.mark.parametrize("build", [llama, gpt2])
def test_biases_and_norms_do_not_decay_as_with_hf_trainer(build: type, tmp_path: str) -> None:
    model = build()
    theirs = Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
    decaying = set(theirs.get_decay_parameter_names(model))
    expected = {name for name, _ in model.named_parameters() if name in decaying}
    section = OptimizerConfig("adamw", weight_decay=0.1)
    made = build_optimizer(list(model.parameters()), section, plain=undecayed(model))
    mine = {id(each) for group in made.param_groups if group["weight_decay"] for each in group["params"]}
    assert {name for name, each in model.named_parameters() if id(each) in mine} == expected
    assert len(expected) < len(list(model.parameters()))


def test_without_decay_or_biases_there_is_one_group() -> None:
    model = llama()
    everything = list(model.parameters())
    assert len(build_optimizer(everything, OptimizerConfig("adamw"), plain=undecayed(model)).param_groups) == 1
    factors = [torch.nn.Parameter(torch.zeros(2, 2))]
    section = OptimizerConfig("adamw", weight_decay=0.1)
    assert len(build_optimizer(factors, section, plain=undecayed(model)).param_groups) == 1
