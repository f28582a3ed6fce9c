"""A base's weights out of its own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lora_exp.errors import UserError
from lora_exp.models import Source
from lora_exp.models.dense_weights import DenseWeights


def test_each_layer_has_its_weight(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    read = DenseWeights(Source(str(tiny_llama)), model)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert torch.equal(read(name), module.weight)


def test_sharded_files_and_a_model_without_its_head(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=29, n_positions=32))
    model.transformer.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    read = DenseWeights(Source(str(tmp_path)), model)
    layer = model.transformer.h[1].attn.c_attn
    assert torch.equal(read("transformer.h.1.attn.c_attn"), layer.weight)
    layer.source_cls = type(layer)  # as bitsandbytes' layers remember that they were a Conv1D
    assert torch.equal(read("transformer.h.1.attn.c_attn"), layer.weight.T)


def test_a_weight_that_is_not_there_is_said(tiny_llama: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    with pytest.raises(UserError, match="has no weight of no_such_layer in its safetensors"):
        DenseWeights(Source(str(tiny_llama)), model)("no_such_layer")
