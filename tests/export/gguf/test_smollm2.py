"""The packaged SmolLM2 with an adapter that was trained for some steps, in llama.cpp and in transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from lora_exp import models
from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.config import ModelConfig
from lora_exp.export.gguf import tokenization
from lora_exp.export.gguf.lora import pairs_of, write_lora
from lora_exp.export.gguf.model import merged, plain, write_model
from lora_exp.machine.packaged import locate_packaged

pytestmark = pytest.mark.slow
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
VERSES = (
    "And the king said unto the people, go thou and build.\nAnd the shepherd said unto the lamb, go thou and rest.\n"
    "And the priest said unto the sea, go thou and sing.\nAnd the ox said unto the mountain, go thou and sow.\n"
)
PROMPTS = (
    "The capital of France is", "And the king said", "Once upon a time, there was", "def add(a, b):", "1, 2, 3, 4,",
    "In the beginning", "The weather today is", "My name is", "Water boils at", "She opened the door and",
)  # fmt: skip
LENGTH = 32
Adapted = tuple[LoraModel, Any]


@pytest.fixture(scope="module")
def section() -> ModelConfig:
    file = Path(__file__).parents[3] / "conf/model/smollm2_135m.yaml"
    found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), OmegaConf.load(file)))
    assert isinstance(found, ModelConfig)
    assert found.packaged is not None
    if locate_packaged(found.packaged) is None:
        pytest.skip("the packaged SmolLM2 is not installed")
    return found


def trained(section: ModelConfig, **options: Any) -> Adapted:
    from transformers import AutoModelForCausalLM

    source = models.find_source(section)
    tokenizer = models.load_tokenizer(source, section)
    base = AutoModelForCausalLM.from_pretrained(source.name, dtype=torch.float32)
    torch.manual_seed(0)
    config = LoraConfig(**{"target_modules": TARGETS, "rank": 8, "lora_alpha": 16, **options})
    model = LoraModel(base, config, "one", verbose=False)
    ids = tokenizer(VERSES, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW(model.adapter_parameters("one").values(), lr=2e-4)
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def adapted(section: ModelConfig) -> Adapted:
    return trained(section)


@torch.no_grad()
def greedy(model: nn.Module, prompt: list[int], length: int) -> list[int]:
    """transformers' likeliest continuation, up to an end of text."""
    out = model.generate(torch.tensor([prompt]), max_new_tokens=length, do_sample=False, pad_token_id=2)  # type: ignore[operator]
    return out[0, len(prompt) :].tolist()


@torch.no_grad()
def gaps(model: nn.Module, rows: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The differences of the log-probability of each token of the texts, given those before it."""
    expected, tokens = model(rows).logits.log_softmax(-1), rows[:, 1:, None]
    difference = (expected[:, :-1].gather(-1, tokens) - found[:, :-1].gather(-1, tokens)).abs()
    told = difference.isfinite()
    assert told.float().mean() > 0.9  # nearly all are among the likeliest
    return difference[told]


@pytest.fixture(scope="module")
def expected(adapted: Adapted) -> tuple[list[list[int]], list[list[int]]]:
    """The prompts, and transformers' continuations of them."""
    model, tokenizer = adapted
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS]
    found = [greedy(model, prompt, LENGTH) for prompt in prompts]
    with model.disable_adapter():
        assert [greedy(model, prompt, LENGTH) for prompt in prompts[:3]] != found[:3], "the adapter changes the answers"
    return prompts, found


def texts(prompts: list[list[int]], answers: list[list[int]]) -> torch.Tensor:
    """(N, 24) tokens: prompts with what follows."""
    joined = [[*prompt, *answer][:24] for prompt, answer in zip(prompts, answers, strict=True)]
    return torch.tensor([text for text in joined if len(text) == 24])


# (what share of the tokens' log-probabilities is within which difference, all are within which, how many of ten
# continuations are the same). q8_0 moves some tokens of this model by more than 0.15 with no adapter at all: see below.
BOUNDS = {
    "f32": (1.0, 0.02, 0.02, 10), "f16": (1.0, 0.02, 0.02, 9), "bf16": (0.9, 0.15, 0.3, 0),
    "q8_0": (0.9, 0.15, 1.0, 0), "q4_k_m": (0.9, 2.0, 5.0, 0),
}  # fmt: skip


@pytest.mark.parametrize("kind", BOUNDS)
def test_merged(
    kind: str, adapted: Adapted, expected: tuple[list[list[int]], list[list[int]]], tmp_path: Path,
    llama_cpp: Callable[..., Any],
) -> None:  # fmt: skip
    (model, tokenizer), (prompts, answers), (share, within, most, alike) = adapted, expected, BOUNDS[kind]
    rows, path = texts(prompts, answers), tmp_path / "model.gguf"
    assert len(rows) >= 8
    write_model(path, plain(model), merged(model, "one"), tokenizer, kind)
    found = llama_cpp(path, rows, prompts=prompts, length=LENGTH)
    same = sum(ours == theirs for ours, theirs in zip(answers, found.answers, strict=True))
    difference = gaps(model, rows, found.log_probabilities)
    near, largest = float(difference.quantile(share)), float(difference.max())
    print(f"{kind}: {near:.2g}, at most {largest:.2g} of a log-probability, {same} continuations of {len(prompts)}")
    assert near < within
    assert largest < most
    assert same >= alike
    assert all(len(answer) > 1 for answer in found.answers)


def test_8_bits_take_as_much_of_the_base_alone(
    adapted: Adapted, expected: tuple[list[list[int]], list[list[int]]], tmp_path: Path, section: ModelConfig,
    llama_cpp: Callable[..., Any],
) -> None:  # fmt: skip
    """What q8_0 changes is llama.cpp's rounding, and not how an adapted model is written."""
    model, tokenizer = adapted
    rows = texts(*expected)
    state = {key: (lambda value=value: value) for key, value in plain_state(section).items()}
    write_model(tmp_path / "base.gguf", plain(model), state, tokenizer, "q8_0")
    write_model(tmp_path / "merged.gguf", plain(model), merged(model, "one"), tokenizer, "q8_0")
    with model.disable_adapter():
        alone = gaps(model, rows, llama_cpp(tmp_path / "base.gguf", rows).log_probabilities)
    inside = gaps(model, rows, llama_cpp(tmp_path / "merged.gguf", rows).log_probabilities)
    print(f"base {alone.mean():.2g}, at most {alone.max():.2g}; merged {inside.mean():.2g}, at most {inside.max():.2g}")
    assert alone.max() > 0.15
    assert inside.mean() < 1.5 * alone.mean()


def test_texts_are_cut_alike(adapted: Adapted, tmp_path: Path, llama_cpp: Callable[..., Any]) -> None:
    model, tokenizer = adapted
    write_model(tmp_path / "model.gguf", plain(model), merged(model, "one"), tokenizer, "q8_0")
    tokenization.save(tmp_path, tokenizer)
    tokenization.check(tmp_path, lambda text: llama_cpp(tmp_path / "model.gguf", texts=[text]).tokens[0])


@pytest.mark.parametrize("use_rslora", [False, True], ids=["standard", "rslora"])
@pytest.mark.parametrize("rank", [4, 64])
def test_base_and_lora_are_merged(
    rank: int, use_rslora: bool, section: ModelConfig, tmp_path: Path, llama_cpp: Callable[..., Any]
) -> None:
    model, tokenizer = trained(section, rank=rank, use_rslora=use_rslora)
    prompts = [tokenizer.encode(prompt) for prompt in PROMPTS[:4]]
    rows = texts(prompts, [greedy(model, prompt, 24) for prompt in prompts])
    base, inside, lora = (tmp_path / f"{name}.gguf" for name in ("base", "merged", "lora"))
    state = {key: (lambda value=value: value) for key, value in plain_state(section).items()}
    write_model(base, plain(model), state, tokenizer, "f32")
    write_model(inside, plain(model), merged(model, "one"), tokenizer, "f32")
    write_lora(lora, plain(model), pairs_of(model, "one"), "f32")
    one = llama_cpp(inside, rows, prompts=prompts, length=LENGTH)
    other = llama_cpp(base, rows, lora=lora, prompts=prompts, length=LENGTH)
    known = one.log_probabilities.isfinite() & other.log_probabilities.isfinite()
    assert (one.log_probabilities - other.log_probabilities)[known].abs().max() < 0.01
    assert one.answers == other.answers
    assert gaps(model, rows, other.log_probabilities).max() < 0.02
    assert one.answers != llama_cpp(base, prompts=prompts, length=LENGTH).answers


def plain_state(section: ModelConfig) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(models.find_source(section).name, dtype=torch.float32).state_dict()
