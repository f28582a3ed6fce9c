"""Sequences that join and leave in any order are written as each would be alone."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp.adapters import BASE, LoraConfig, LoraModel
from lora_exp.machine.place import Place
from lora_exp.use.serving.batch import Batch

_SIZES = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
_LLAMA = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 128}


def tiny(name: str) -> Any:
    import transformers as hf

    made: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA)),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=128)
        ),
        "opt": lambda: hf.OPTForCausalLM(
            hf.OPTConfig(**_SIZES, ffn_dim=48, max_position_embeddings=128, word_embed_proj_dim=32)
        ),
        "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, sliding_window=5)),
        "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**_LLAMA, head_dim=8, sliding_window=5)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, head_dim=8)),
        "mixtral": lambda: hf.MixtralForCausalLM(
            hf.MixtralConfig(**_LLAMA, num_local_experts=4, num_experts_per_tok=2)
        ),
    }
    torch.manual_seed(0)
    model = made[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model


def trained(name: str) -> Any:
    """Two adapters of unlike ranks, one of them DoRA, on a tiny model; as much of ``Trained`` as a batch looks at."""
    model = LoraModel(tiny(name), LoraConfig(target_modules="all-linear", rank=2), "a", verbose=False)
    model.add_adapter("b", LoraConfig(target_modules="all-linear", rank=5, use_dora=True))
    with torch.no_grad():
        for adapter in ("a", "b"):
            for key, parameter in model.adapter_parameters(adapter).items():
                if not key.endswith("magnitude"):
                    parameter.normal_(std=0.3)
    return SimpleNamespace(model=model.eval(), place=Place(torch.device("cpu"), torch.float32))


def alone(model: LoraModel, prompt: list[int], adapter: str, count: int) -> list[int]:
    """By the whole text anew each step, without a cache and without padding."""
    ids = list(prompt)
    with torch.no_grad(), model.route_samples([adapter]):
        for _ in range(count):
            ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "bloom", "mistral", "gemma2", "qwen3", "mixtral"])
def test_each_is_written_as_it_would_be_alone(name: str) -> None:
    here, draw = trained(name), random.Random(5)
    batch, running, done = Batch(here), [], []
    wishes = [
        SimpleNamespace(
            prompt=[draw.randrange(97) for _ in range(draw.choice((1, 2, 7, 15)))],
            adapter=draw.choice(("a", "b", BASE)), most=draw.randint(1, 9), written=[],
        )
        for _ in range(14)
    ]  # fmt: skip
    waiting = list(wishes)
    while waiting or running:
        new = [waiting.pop(0) for _ in range(min(len(waiting), draw.randint(0, 3), 6 - len(running)))]
        if new:
            logits, order = batch.join([each.prompt for each in new], [each.adapter for each in new])
            running = [(*running, *new)[place] for place in order]
            rows = new
        elif running:
            logits, rows = batch.step([each.written[-1] for each in running]), running
        else:
            continue
        assert batch.names == [each.adapter for each in running]
        assert batch.names == sorted(batch.names)  # so that each adapter's rows are one slice
        for each, token in zip(rows, logits.argmax(-1).tolist(), strict=True):
            each.written.append(token)
        left = [place for place, each in enumerate(running) if len(each.written) < each.most]
        done += [each for each in running if len(each.written) == each.most]
        if len(left) < len(running):
            running = [running[place] for place in left]
            batch.keep(left)
    assert len(done) == len(wishes)
    for each in wishes:
        assert each.written == alone(here.model, each.prompt, each.adapter, each.most)


def test_slots_that_nobody_has_a_token_in_are_dropped() -> None:
    batch = Batch(trained("llama"))
    _, order = batch.join([[1] * 20, [2] * 3], ["a", "b"])
    assert order == [0, 1]
    batch.step([1, 1])
    batch.keep([1])
    assert batch._mask.tolist() == [[1] * 4]
    assert {layer.keys.shape[2] for layer in batch._cache.layers} == {4}
    batch.keep([])
    logits, _ = batch.join([[3, 4]], [BASE])
    assert logits.shape == (1, 97)
