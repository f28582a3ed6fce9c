"""Gradient checkpointing: the same gradients, and nothing recomputed that nobody's gradient passes through."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_exp import LoraConfig, LoraModel
from lora_exp.models import checkpoint_layers

LAYERS, LOWEST = 4, 2
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}


def gradients(is_checkpointed: bool, targets: str) -> tuple[dict[str, torch.Tensor], Counter[int]]:
    """Of a pass and its way back, and how often each layer was called by both."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(vocab_size=96, **SIZES))
    base.config.use_cache = False
    model = LoraModel(base, LoraConfig(rank=4, target_modules=targets), verbose=False)
    if is_checkpointed:
        checkpoint_layers(base)
    called = Counter[int]()
    for number, layer in enumerate(base.model.layers):
        layer.mlp.register_forward_pre_hook(lambda *_, number=number: called.update([number]))
    tokens = torch.randint(96, (2, 8))
    model.train()
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.adapter_parameters().items()}, called


@pytest.mark.parametrize(
    ("targets", "lowest"), [(r".*layers\.[23]\..*q_proj", LOWEST), (r".*q_proj", 0), (r".*embed_tokens", 0)]
)
def test_only_what_a_gradient_passes_through_is_recomputed(targets, lowest):
    plain, once = gradients(False, targets)
    ours, called = gradients(True, targets)
    assert plain
    assert all(torch.equal(ours[name], plain[name]) for name in plain)
    assert set(once.values()) == {1}
    assert dict(called) == {number: 1 if number < lowest else 2 for number in range(LAYERS)}
