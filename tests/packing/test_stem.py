"""Lanes of the same rows, whose lowest layers see them once: what each learns, and when it is left alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from lora_exp import LoraConfig, LoraModel
from lora_exp.adapters.joint import JointModel
from lora_exp.config import Config, TrainConfig
from lora_exp.models.twin import twin
from lora_exp.packing.company import Company
from lora_exp.packing.stem import Stem

from .in_lanes import ROWS, Kind, batches_of, in_company, same, trained

LAYERS = 4
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
UPPER = r".*layers\.[23]\..*(q_proj|down_proj)"
TOP = r".*layers\.3\..*_proj"


def upper(rank: int, targets: str = UPPER, **choices: Any) -> LoraConfig:
    return LoraConfig(rank=rank, target_modules=targets, **choices)


ONE_SEED = [
    Kind(upper(2)),
    Kind(upper(8, lora_dropout=0.3)),
    Kind(upper(4, TOP, variant="dora"), steps=4),
    Kind(upper(4, start="pissa"), lr=1e-3),
]


@pytest.fixture(scope="module")
def base() -> torch.nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False).eval()
    model.config.use_cache = False
    return model


def learnt_alike(base: torch.nn.Module, kinds: Sequence[Kind], config: Config | None = None) -> Company:
    turns, company = in_company(base, kinds, config=config)
    for kind, turn in zip(kinds, turns, strict=True):
        alone, ours = trained(base, kind), turn.result
        assert turn.error is None
        for mine, theirs in zip(ours[:-1], alone[:-1], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert torch.allclose(ours[-1]["parameters"], alone[-1]["parameters"], atol=1e-4)
    return company


def spared(company: Company) -> int:
    assert company.stem is not None
    return company.stem.spared


def test_lanes_of_the_same_rows_learn_what_each_learns_alone(base):
    """Two of four layers lie below all; the lane of four steps is gone after them, and its place with it."""
    company = learnt_alike(base, ONE_SEED)
    assert company.joined_passes == 6
    once = 2 * ROWS  # layers, rows of a lane that are not seen again
    tried = once * 3  # the first pass looks whether the layers can be called so
    assert spared(company) == once * (3 * 4 + 2 * 2) + tried


def test_lanes_of_two_seeds_are_two_sets_of_rows(base):
    kinds = [replace(kind, seed=number % 2, steps=6) for number, kind in enumerate(ONE_SEED)]
    assert spared(learnt_alike(base, kinds)) == 2 * ROWS * 2 * (6 + 1)


def test_lanes_of_several_micro_batches(base):
    """Two lanes have two in a step: they go on without the third."""
    kinds = [replace(ONE_SEED[0], accumulate=2), replace(ONE_SEED[1], accumulate=2), ONE_SEED[3]]
    assert spared(learnt_alike(base, kinds)) > 0


@pytest.mark.parametrize(
    ("why", "kinds"),
    [
        ("other rows", [replace(kind, seed=number) for number, kind in enumerate(ONE_SEED)]),
        ("the lowest layer is adapted", [*ONE_SEED[:2], Kind(LoraConfig(rank=2))]),
        ("the embedding is adapted", [Kind(upper(2, r"(.*layers\.3\..*q_proj|.*embed_tokens)")), ONE_SEED[1]]),
    ],
)
def test_it_is_left_alone_where_nothing_is_in_common(base, why, kinds):
    assert spared(learnt_alike(base, kinds)) == 0


@pytest.mark.parametrize("leaves", [{"fails_at": 3}, {"fails_at": 0}, {"diverges": True}])
@pytest.mark.parametrize("seeds", [(0, 0, 0, 0), (0, 1, 0, 1), (0, 0, 0, 1)])
def test_one_that_leaves_does_not_touch_the_bits_of_the_others(base, leaves, seeds):
    kinds = [replace(kind, seed=seed, steps=6) for kind, seed in zip(ONE_SEED, seeds, strict=True)]
    whole, _ = in_company(base, kinds)
    others, company = in_company(base, [*kinds[:2], replace(kinds[2], **leaves), kinds[3]])
    assert others[2].error is not None
    assert spared(company) > 0
    for number in (0, 1, 3):
        assert same(others[number].result, whole[number].result)


def test_one_that_is_gone_needs_no_rows_of_its_own(base):
    kinds = [replace(ONE_SEED[0], steps=6)] * 3
    _, company = in_company(base, [replace(kinds[0], fails_at=3), *kinds[1:]])
    assert spared(company) == 2 * ROWS * 2 * (6 + 1)


def test_the_first_pass_settles_it(base):
    """So that nobody's last bits change when rows come to be the same, or cease to be."""
    one, other = (next(batches_of(seed)) for seed in (0, 1))
    model = LoraModel(twin(base), upper(2), verbose=False)
    for first, then, rows in (([one, other], [one, one], 0), ([one, one], [one, other], ROWS * 2 * 2)):
        joint = JointModel(twin(base))
        for name in "ab":
            joint.borrow(name, model)
        stem = Stem(joint)
        for batches in (first, then):
            batch = stem.joining(lambda each: {name: torch.cat([b[name] for b in each]) for name in each[0]})(batches)
            with stem.passing(joint.passing({"a": ROWS, "b": ROWS})), torch.no_grad():
                joint(input_ids=batch["input_ids"])
        assert stem.spared == rows
        assert bool(stem.is_used) == (rows > 0)


def test_rows_are_the_same_where_all_of_a_batch_is(base):
    """Equal tokens under unlike masks are not."""
    tokens, whole = torch.ones(ROWS, 4, dtype=torch.long), torch.ones(ROWS, 4)
    masked = whole.clone()
    masked[0, 0] = 0
    stem = Stem(JointModel(twin(base)))
    batches = [{"input_ids": tokens, "attention_mask": mask} for mask in (whole, masked, whole.clone())]
    stem.joining(lambda each: each[0])(batches)
    assert stem._rows is not None
    assert (stem._rows.of_lanes, stem._rows.sets) == ([0, 1, 0], [slice(0, ROWS), slice(ROWS, 2 * ROWS)])


def test_one_that_comes_later_takes_a_place_with_rows_of_its_own(base):
    kinds = [replace(ONE_SEED[0], steps=6)] * 4
    turns, company = in_company(base, [replace(kinds[0], fails_at=2), *kinds[1:]], most=2)
    assert [turn.error is None for turn in turns] == [False, True, True, True]
    whole, _ = in_company(base, kinds[:2])
    assert same(turns[1].result, whole[1].result)
    assert spared(company) > 0


def test_with_gradient_checkpointing(base):
    config = Config(train=TrainConfig(gradient_checkpointing=True))
    assert spared(learnt_alike(base, ONE_SEED, config)) == spared(learnt_alike(base, ONE_SEED))


def test_a_layer_that_cannot_be_called_with_a_part_of_the_rows_sees_all(base):
    odd = twin(base)
    layer = odd.model.layers[1]
    layer.__class__ = type("Picky", (type(layer),), {"forward": _picky(type(layer).forward)})
    layer.wants = 2 * ROWS
    turns, company = in_company(odd, ONE_SEED[:2])
    layer.wants = 0
    assert all(turn.error is None for turn in turns)
    assert spared(company) == ROWS * (6 + 1)  # by layer 0


def _picky(plain: Any) -> Any:
    def forward(self: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.training and len(hidden) < self.wants:
            raise RuntimeError("too few rows")
        return plain(self, hidden, *args, **kwargs)

    return forward


def test_arguments_that_are_no_rows_but_follow_from_them(base):
    """BLOOM's layers are given a bias a row and head, in one dimension."""
    torch.manual_seed(2)
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=LAYERS, n_head=4)
    model = BloomForCausalLM(config).requires_grad_(False).eval()
    model.config.use_cache = False
    kinds = [Kind(LoraConfig(rank=rank, target_modules=r".*h\.[23]\..*query_key_value")) for rank in (2, 4)]
    assert spared(learnt_alike(model, kinds)) == 0


def test_another_architecture(base):
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=8)).requires_grad_(False).eval()
    model.config.use_cache = False
    assert spared(learnt_alike(model, ONE_SEED)) > 0
