"""Packing: what fits, and that no conversation of a row sees another, whatever the model and its attention."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from lora_exp.data.chat.packing import Packed, best_fit, join, pack, pad, row_of
from lora_exp.data.chat.packing_check import check_keeps_apart
from lora_exp.errors import UserError
from lora_exp.training.objectives import IGNORED, causal_lm_losses, losses_from_logits

COMMON = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0, "initializer_range": 0.5,
}  # fmt: skip
LLAMA: dict[str, Any] = {"model_type": "llama", **COMMON}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "qwen3": {"model_type": "qwen3", **COMMON},
    "mistral, a window of 4": {"model_type": "mistral", "sliding_window": 4, **COMMON},
    "gemma3, windows of 4 and none": {
        "model_type": "gemma3_text", "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8, **COMMON,
    },
    "gpt2, a table of positions": {
        "model_type": "gpt2", "vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "initializer_range": 0.5,
    },
}  # fmt: skip
APART = ("sdpa", "eager")


def model_of(facts: dict[str, Any], attention: str = "sdpa") -> nn.Module:
    torch.manual_seed(0)
    config = AutoConfig.for_model(**facts)
    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    model.config.use_cache = False  # as models are loaded to train
    return model.eval()


def rows_of(*lengths: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = [row_of(torch.randint(3, 97, (length,), generator=generator).tolist()) for length in lengths]
    for row in rows:
        row["labels"][: len(row["labels"]) // 2] = IGNORED
    return rows


def logits(model: nn.Module, row: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(**{name: row[name][None] for name in row if name != "labels"}).logits[0]
    return found


@pytest.mark.parametrize("attention", APART)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_changes_nothing_in_the_others_of_its_row(family: str, attention: str) -> None:
    model, rows, size = model_of(FAMILIES[family], attention), rows_of(9, 12, 7), 32
    before = logits(model, pack(rows, size))
    places = [slice(0, 9), slice(9, 21), slice(21, 28)]
    for changed, others in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        here = list(rows)
        here[changed] = rows_of(*(len(row["labels"]) for row in rows), seed=2)[changed]
        after = logits(model, pack(here, size))
        assert not torch.equal(after[places[changed]], before[places[changed]])
        for other in others:
            assert torch.equal(after[places[other]], before[places[other]])
    for row, place in zip(rows, places, strict=True):
        alone = logits(model, {"input_ids": row["input_ids"]})
        torch.testing.assert_close(before[place], alone, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("attention", APART)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("losses", [causal_lm_losses, losses_from_logits])
def test_packed_and_padded_rows_have_the_same_losses_and_gradients(
    family: str, attention: str, losses: Callable[..., Any]
) -> None:
    model, rows = model_of({**FAMILIES[family], "initializer_range": 0.1}, attention), rows_of(9, 12, 7, 3, 20)
    packed = pad([pack(rows[:3], 32), pack(rows[3:], 32)])
    found = []
    for batch in (packed, pad(rows)):
        model.zero_grad()
        result = losses(model, batch)
        mean = result.total.sum() / result.count.sum()
        mean.backward()
        found.append((mean, int(result.count.sum()), [weight.grad for weight in model.parameters()]))
    (one, tokens, gradients), (other, same, others) = found
    assert tokens == same == sum(len(row["labels"]) - max(1, len(row["labels"]) // 2) for row in rows)
    assert one.item() == pytest.approx(other.item(), abs=1e-6)
    for gradient, expected in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_labels_never_predict_across_a_border() -> None:
    packed = pack([row_of([5, 6, 7]), row_of([8, 9]), row_of([4])], 8)
    assert packed["labels"].tolist() == [IGNORED, 6, 7, IGNORED, 9, IGNORED, IGNORED, IGNORED]
    assert packed["position_ids"].tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert packed["input_ids"].tolist() == [5, 6, 7, 8, 9, 4, 0, 0]


@pytest.mark.parametrize("attention", APART)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_that_keep_conversations_apart_pass_the_check(family: str, attention: str) -> None:
    model = model_of(FAMILIES[family], attention).train()
    check_keeps_apart(model, torch.device("cpu"))
    assert model.training


class Forgetful(nn.Module):
    """Gives a model a mask of two dimensions, which switches transformers' eye for packed rows off."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        return self.model(input_ids, attention_mask=torch.ones_like(input_ids), position_ids=position_ids)


class Unmoved(nn.Module):
    """Keeps conversations apart, and counts positions through the whole row all the same."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.table = model, nn.Parameter(torch.randn(64, 97))

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Any:
        found = self.model(input_ids, position_ids=position_ids)
        found.logits = found.logits + self.table[: input_ids.shape[1]]
        return found


class Positionless(nn.Module):
    def forward(self, input_ids: Tensor) -> Any:
        raise AssertionError("not called")


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Forgetful(model_of(LLAMA)), "what stands before a conversation changes what Forgetful predicts"),
        (lambda: Unmoved(model_of(LLAMA)), "a conversation's place in the row changes what Unmoved predicts"),
        (lambda: model_of({"model_type": "bloom", "vocab_size": 97, "hidden_size": 32, "n_layer": 2, "n_head": 4},
                          "eager"),
         "a conversation's place in the row changes what BloomForCausalLM predicts"),
        (lambda: Positionless(), "Positionless takes no positions"),
        (lambda: model_of({"model_type": "mamba", "vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2,
                           "state_size": 8}, "eager"), "MambaForCausalLM"),
    ],
)  # fmt: skip
def test_models_that_let_conversations_mix_are_refused(make: Callable[[], nn.Module], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        check_keeps_apart(make(), torch.device("cpu"))


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_loses_nothing_and_overfills_nothing(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.randint(1, draw.choice([5, 20, 40])) for _ in range(draw.randrange(120))]
    groups = best_fit(lengths, 40)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    sums = sorted(sum(lengths[index] for index in group) for group in groups)
    assert all(0 < total <= 40 for total in sums)
    assert len(groups) < 2 or sums[0] + sums[1] > 40  # two groups that fit into one would be one


@pytest.mark.parametrize(
    ("lengths", "groups"),
    [([6, 4, 5, 5], 2), ([7, 6, 3, 4], 2), ([10, 1], 2), ([], 0)],
)
def test_best_fit_is_tight(lengths: list[int], groups: int) -> None:
    assert len(best_fit(lengths, 10)) == groups


def test_packed_rows_are_full_and_each_conversation_occurs_once() -> None:
    rows = rows_of(*range(2, 30))
    packed = Packed(rows, [len(row["input_ids"]) for row in rows], 32)  # type: ignore[arg-type]
    tokens = sum((packed[index]["labels"] != IGNORED).sum().item() for index in range(len(packed)))
    assert tokens == sum((row["labels"][1:] != IGNORED).sum().item() for row in rows)
    assert packed.filled > 0.9
    assert all(len(packed[index]["input_ids"]) == 32 for index in range(len(packed)))


def test_lanes_of_unlike_lengths_are_joined() -> None:
    joined = join([pad(rows_of(3, 4)), pad(rows_of(6))])
    assert joined["input_ids"].shape == (3, 6)
    assert joined["labels"][0, 3:].tolist() == [IGNORED] * 3
