"""What says that it begins as the base does so in every bit."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.adapters.starts.registry import start_names
from lora_exp.adapters.variants.registry import variant_named, variant_names
from lora_exp.backends.native import starts_at_base

CHOICES = [
    LoraConfig(rank=4, variant=variant, start=start)
    for variant in variant_names()
    for start in (start_names() if vars(variant_named(variant)).get("takes_starts", False) else ["default"])
]
SAYING_SO = [config for config in CHOICES if starts_at_base(config)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SAYING_SO, ids=lambda config: f"{config.variant}-{config.start}")
def test_an_untrained_adapter_gives_the_bits_of_the_base(tiny_llama, config, dtype):
    base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype).eval()
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        alone = base(tokens).logits
        model = LoraModel(base, config, verbose=False).eval()
        assert torch.equal(model(tokens).logits, alone)


def test_who_says_so():
    said = {(config.variant, config.start) for config in SAYING_SO}
    assert {("lora", "default"), ("lora", "pissa"), ("lora_fa", "olora"), ("vera", "default")} <= said
    assert not said & {("dora", "default"), ("lora", "orthogonal"), ("lora", "loftq")}
