"""What decays, against HF's Trainer."""

from __future__ import annotations

from collections.abc import Callable

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


def ours(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    return build_optimizer([parameter], OptimizerConfig("adamw", lr=0.1, weight_decay=0.1))


def loop(parameter: torch.nn.Parameter) -> torch.optim.Optimizer:
    return torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.1, foreach=False, fused=False)


def updated(parameter: torch.nn.Parameter, by: Callable[[torch.nn.Parameter], torch.optim.Optimizer]) -> torch.Tensor:
    """The parameter after five steps."""
    made = by(parameter)
    target = torch.arange(parameter.numel(), dtype=parameter.dtype).reshape(parameter.shape)
    for _ in range(5):
        made.zero_grad()
        ((parameter - target) ** 2).sum().backward()
        made.step()
    return parameter.detach()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contiguous_parameters_are_updated_by_one_kernel_to_the_same_values(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    values = torch.randn(33, 7, dtype=dtype)
    mine = torch.nn.Parameter(values.clone())
    assert ours(mine).defaults["fused"]
    exact = updated(torch.nn.Parameter(values.float()), loop)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 0.02}[dtype]
    torch.testing.assert_close(updated(mine, ours).float(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("made", [lambda: torch.randn(12, 6).T, lambda: torch.randn(6, 24)[:, ::2]])
def test_others_are_not_since_the_kernel_would_take_gradients_by_their_place_in_memory(
    made: Callable[[], torch.Tensor],
) -> None:
    torch.manual_seed(0)
    parameter = torch.nn.Parameter(made())
    expected = updated(torch.nn.Parameter(parameter.detach().contiguous()), loop)
    assert not ours(parameter).defaults["fused"]
    torch.testing.assert_close(updated(parameter, ours), expected)


def test_a_checkpoint_of_before_the_kernel_goes_on_without_it() -> None:
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    made = ours(parameter)
    made.load_state_dict(loop(parameter).state_dict())
    assert not made.param_groups[0]["fused"]
