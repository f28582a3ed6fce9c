"""How many lanes are tried, and what trying them leaves behind: nothing."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_exp import LoraConfig, LoraModel
from lora_exp.adapters.joint import JointModel
from lora_exp.config import Config, OptimizerConfig, TrainConfig
from lora_exp.data.kinds.images import Images
from lora_exp.data.kinds.text import Text
from lora_exp.errors import UserError
from lora_exp.machine.place import Place
from lora_exp.models.twin import twin
from lora_exp.packing import lanes, launching, measuring, turns
from lora_exp.packing.company import Asked
from lora_exp.packing.launching import Wish, groups_of, most_lanes
from lora_exp.training.lane import Lane
from lora_exp.training.loop import Forward
from lora_exp.training.objectives import causal_lm_losses, count_predictions
from lora_exp.training.optimizers import build_optimizer
from lora_exp.training.schedules import build_schedule
from lora_exp.training.timetable import Timetable

AUTO = Wish.of("auto", "auto")


def config(tokens: int = 16, rows: int = 1, **changes: Any) -> Config:
    made = Config(data=Text(block_size=tokens), train=TrainConfig(micro_batch_size=rows), device="cpu", **changes)
    made.model.modules_to_save = []
    return made


@pytest.mark.parametrize(
    ("tokens", "rows", "lanes"), [(16, 1, 16), (16, 2, 8), (128, 1, 2), (128, 4, 1), (100, 1, 2), (300, 1, 1)]
)
def test_a_cpu_tries_passes_of_256_tokens(tokens: int, rows: int, lanes: int) -> None:
    assert measuring.most_by_tokens(config(tokens, rows), "cpu") == lanes


@pytest.mark.parametrize(("tokens", "rows", "at_once"), [(16, 1, 16), (16, 8, 16), (40, 5, None), (128, 4, None)])
def test_a_lane_evaluates_what_makes_a_common_pass(
    tokens: int, rows: int, at_once: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turns, "current", lambda: turns.Turn("0", lambda: None, is_joined=True))
    assert lanes.evaluation_rows(config(tokens, rows)) == at_once


def test_images_are_not_joined_unasked() -> None:
    assert measuring.most_by_tokens(Config(data=Images()), "cpu") == 1


def test_the_memory_bounds_lanes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Planned:
        base_bytes, total_bytes = {"float32": 4 * 2**30}, 5 * 2**30  # so that a lane takes one GiB

    class Planner:
        def __init__(self, *_: object, **__: object) -> None: ...

        def upper_bound(self) -> float:
            return float("inf")

        def plan(self) -> Planned:
            return Planned()

    monkeypatch.setattr(measuring, "Planner", Planner)
    monkeypatch.setattr(measuring, "memory_gib", lambda device: 10.0)
    place = Place(torch.device("cpu"), torch.float32)
    assert measuring.most_by_memory(config(), 16, place) == 4  # of 8 GiB


@pytest.mark.parametrize(
    ("wish", "lanes"),
    [(("auto", "turns"), 1), ((1, "joined"), 1), ((3, "auto"), 3), ((9, "turns"), 4), (("auto", "joined"), 4)],
)
def test_a_wish_counts(wish: tuple[Any, str], lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "most_by_memory", lambda config, most, place: most)
    assert most_lanes([config()] * 4, Wish.of(*wish)) == lanes


@pytest.mark.parametrize(
    "changes", [{"backend": "peft"}, {"trainer": "hf"}, {"bias": "all"}, {"task": "plan"}, {"parallel": "ddp"}]
)
def test_what_cannot_share_a_pass_is_alone(changes: dict[str, str]) -> None:
    assert most_lanes([config(**changes)] * 4, Wish.of(4, "joined")) == 1


def test_jobs_of_one_base_follow_each_other_and_unlike_rows_are_no_lanes() -> None:
    small, other = config(), config()
    other.model.name = "another"
    assert groups_of([small, other, None, config(), config(rows=2), other]) == [[0, 3], [4], [1, 5], [2]]


@pytest.mark.parametrize(("lanes", "passes"), [(0, "auto"), (True, "auto"), ("two", "auto"), (2, "both")])
def test_a_wish_that_is_none_is_refused(lanes: object, passes: str) -> None:
    with pytest.raises(UserError, match=r"hydra\.launcher\.(lanes|passes)="):
        launching.Wish.of(lanes, passes)
    with pytest.raises(UserError, match=r"hydra\.launcher\.products=both is not known: use auto, each or batched"):
        launching.Wish.of("auto", "auto", "both")


@pytest.mark.parametrize(
    ("products", "on_cpu", "on_gpu"), [("auto", False, True), ("each", False, False), ("batched", True, True)]
)
def test_products_are_batched_on_a_gpu_or_as_wished(products: str, on_cpu: bool, on_gpu: bool) -> None:
    wish = Wish.of("auto", "auto", products)
    assert (wish.is_batched("cpu"), wish.is_batched("cuda")) == (on_cpu, on_gpu)


def test_fewer_are_taken_where_many_do_not_pay(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {1: 1.0, 8: 8.0, 4: 3.0}
    monkeypatch.setattr(measuring, "_timed", lambda asked, count, *_: seconds[count])
    assert measuring.most_that_pay(asked, 8, lambda device: None) == 4
    seconds.update({4: 3.9, 2: 1.9})
    assert measuring.most_that_pay(asked, 8, lambda device: None) == 1


def test_measuring_leaves_nothing_behind(asked: Asked, tiny_llama: Path) -> None:
    model = asked.forward.model
    assert isinstance(model, LoraModel)
    before = model.dropout_state(), torch.get_rng_state(), [value.clone() for value in asked.lane.parameters]
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert measuring.most_that_pay(asked, 4, lambda device: JointModel(twin(base))) in (1, 2, 4)
    after = model.dropout_state(), torch.get_rng_state(), asked.lane.parameters
    assert after[0] == before[0]
    assert torch.equal(after[1], before[1])
    assert all(torch.equal(now, then) for now, then in zip(after[2], before[2], strict=True))
    assert all(parameter.grad is None for parameter in asked.lane.parameters)


def test_what_is_tried_is_not_told_as_what_is_done(tiny_llama: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    high = asked_for(tiny_llama, target_modules=r".*layers\.1\..*_proj")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert measuring.most_that_pay(high, 4, lambda device: JointModel(twin(base)), below=1) in (1, 2, 4)
    assert "in one pass" in caplog.text or "share a pass" in caplog.text
    assert "go once" not in caplog.text


@pytest.fixture
def asked(tiny_llama: Path) -> Asked:
    return asked_for(tiny_llama)


def asked_for(tiny_llama: Path, **choices: Any) -> Asked:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model = LoraModel(base, LoraConfig(rank=2, lora_dropout=0.3, **choices), verbose=False)
    parameters, section = list(model.adapter_parameters().values()), TrainConfig(steps=4)
    optimizer, times = build_optimizer(parameters, OptimizerConfig("adamw")), Timetable.of(section, None)
    schedule = build_schedule(optimizer, section, times)
    tokens = torch.arange(24).view(2, 12)
    batch = {"input_ids": tokens, "labels": tokens}
    lane = Lane("default", parameters, iter([batch]), [batch], optimizer, schedule, times)
    forward = Forward(model, causal_lm_losses, count_predictions, torch.device("cpu"))
    return Asked(config(), forward, lane, [[batch]])
