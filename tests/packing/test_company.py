"""Lanes in one pass against the same lanes alone: what each learns, and what is left of it when another leaves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_exp import LoraConfig
from lora_exp.adapters.joint import JointModel
from lora_exp.config import Config
from lora_exp.models.twin import twin
from lora_exp.packing.company import Company
from lora_exp.packing.lanes import passes_of, run_in_lanes
from lora_exp.packing.turns import Turn

from .in_lanes import Kind, in_company, same, trained

UNLIKE = [
    Kind(LoraConfig(rank=2)),
    Kind(LoraConfig(rank=8, lora_alpha=4, use_rslora=True, lora_dropout=0.3), seed=1),
    Kind(LoraConfig(rank=3, variant="dora"), lr=5e-3, steps=9),
    Kind(LoraConfig(rank=4, variant="dora", lora_dropout=0.2), seed=2, steps=4),
    Kind(LoraConfig(rank=4, variant="vera"), lr=0.1, schedule="linear"),
    Kind(LoraConfig(rank=5, variant="lora_fa", lora_dropout=0.5), seed=3, steps=7),
    Kind(LoraConfig(rank=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.1), accumulate=2, seed=4),
    Kind(LoraConfig(rank=4, start="pissa"), lr=1e-3, schedule="constant", seed=5, steps=5),
]
SOME = list(enumerate(UNLIKE[1:3]))


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32).requires_grad_(False).eval()


def test_eight_unlike_lanes_learn_what_each_learns_alone(base):
    before = [parameter.clone() for parameter in base.parameters()]
    turns, company = in_company(base, UNLIKE)
    assert company.is_joined
    assert company.joined_passes == 7  # then one lane is left
    for kind, turn in zip(UNLIKE, turns, strict=True):
        alone, ours = trained(base, kind), turn.result
        assert turn.error is None
        assert [record.keys() for record in ours] == [record.keys() for record in alone]
        for mine, theirs in zip(ours[:-1], alone[:-1], strict=True):
            close = {name: pytest.approx(value, abs=1e-5) for name, value in theirs.items() if name.startswith("train")}
            close |= {name: pytest.approx(theirs[name], abs=1e-6) for name in theirs if name.startswith("eval/loss")}
            assert {name: mine[name] for name in close} == close
        assert torch.allclose(ours[-1]["parameters"], alone[-1]["parameters"], atol=1e-4)
    assert all(torch.equal(kept, now) for kept, now in zip(before, base.parameters(), strict=True))


def test_batched_products_teach_the_same(base):
    """Of unlike ranks, dropout, variants and lengths; whoever ends leaves zeros behind."""
    kinds = [kind for kind in UNLIKE if kind.adapter.variant != "dora"]
    turns, company = in_company(base, kinds, is_batched=True)
    assert company.joined_passes == 6  # then one lane is left
    for kind, turn in zip(kinds, turns, strict=True):
        alone, ours = trained(base, kind), turn.result
        for mine, theirs in zip(ours[:-1], alone[:-1], strict=True):
            assert mine == pytest.approx(theirs, abs=1e-5)
        assert torch.allclose(ours[-1]["parameters"], alone[-1]["parameters"], atol=1e-4)


@pytest.mark.parametrize("leaves", [{"fails_at": 3}, {"fails_at": 0}, {"diverges": True}])
def test_one_that_leaves_does_not_touch_the_bits_of_the_others(base, leaves):
    kinds = UNLIKE[:5]
    whole, _ = in_company(base, kinds)
    others, _ = in_company(base, [*kinds[:2], replace(kinds[2], **leaves), *kinds[3:]])
    assert others[2].error is not None
    for number in (0, 1, 3, 4):
        assert same(others[number].result, whole[number].result)


def test_one_that_comes_later_takes_the_place_of_one_that_is_gone(base):
    kinds = [replace(UNLIKE[0], seed=seed) for seed in range(5)]
    turns, _ = in_company(base, [replace(kinds[0], fails_at=2), *kinds[1:]], most=2)
    assert [turn.error is None for turn in turns] == [False, True, True, True, True]
    whole, _ = in_company(base, kinds[:2])
    assert same(turns[1].result, whole[1].result)


def test_a_model_that_draws_for_all_rows_at_once_is_not_shared(base):
    drops = twin(base)
    drops.model.layers[0].mlp.register_forward_hook(lambda module, args, out: torch.dropout(out, 0.1, module.training))
    turns, company = in_company(drops, UNLIKE[:2])
    assert not company.is_joined
    for kind, turn in zip(UNLIKE[:2], turns, strict=True):
        assert same(turn.result, trained(drops, kind))


@pytest.mark.parametrize("where", ["choosing", "seating", "passing"])
def test_an_error_in_what_is_shared_leaves_each_lane_to_itself(base, where, monkeypatch):
    def broken(*_: Any) -> Any:
        raise RuntimeError("no room")

    company = Company(broken if where == "seating" else lambda device: JointModel(twin(base)))
    if where == "passing":
        monkeypatch.setattr("lora_exp.packing.company.joined", broken)
    turns = [Turn(str(n), lambda kind=kind: trained(base, kind, passes=passes_of(Config()))) for n, kind in SOME]
    run_in_lanes(turns, company, broken if where == "choosing" else lambda asked: 2)
    assert not company.is_joined
    assert all(same(turn.result, trained(base, kind)) for turn, (_, kind) in zip(turns, SOME, strict=True))
