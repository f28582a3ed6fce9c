"""Schedules against transformers', which everyone compares with."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION

from lora_exp.config import TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.schedules import SCHEDULES, build_schedule, schedule_problems
from lora_exp.training.timetable import Timetable

CURVES: list[tuple[str, dict[str, Any]]] = [
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("linear", {}),
    ("constant_with_warmup", {}),
    ("cosine_with_restarts", {"num_cycles": 2}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_with_min_lr", {"min_lr": 0.01}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}),
    ("polynomial", {"lr_end": 1e-3, "power": 2.0}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 5}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 4, "decay_type": "1-sqrt", "warmup_type": "cosine"}),
]


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return seen


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.1)


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(("name", "options"), CURVES, ids=[f"{name}-{options}" for name, options in CURVES])
def test_schedules_are_those_of_transformers(name: str, options: dict[str, Any], warmup: int) -> None:
    section = TrainConfig(schedule=name, schedule_options=options)
    mine = build_schedule(optimizer(), section, Timetable(12, warmup_steps=warmup))
    expected = get_scheduler(name, optimizer(), warmup, 12, options or None)
    assert rates(mine, 14) == pytest.approx(rates(expected, 14), abs=1e-12)


def test_constant_warms_up_if_there_is_a_warm_up() -> None:
    mine = build_schedule(optimizer(), TrainConfig(schedule="constant"), Timetable(6, warmup_steps=2))
    assert rates(mine, 6) == [0.0, 0.05, 0.1, 0.1, 0.1, 0.1]


def test_names_and_options_are_those_of_transformers_but_for_what_looks_at_the_loss() -> None:
    theirs = {str(kind.value): made for kind, made in TYPE_TO_SCHEDULER_FUNCTION.items()}
    assert set(theirs) - set(SCHEDULES) == {"reduce_lr_on_plateau", "greedy"}
    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    for name, options in SCHEDULES.items():
        assert set(options) == set(inspect.signature(theirs[name]).parameters) - ours


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("coseno", {}, "train.schedule=coseno is not known: choose one of cosine, linear"),
        ("reduce_lr_on_plateau", {}, "choose one of cosine"),
        ("linear", {"power": 2}, "power is no option of train.schedule=linear; it takes none"),
        ("polynomial", {"end": 2}, "end is no option of train.schedule=polynomial; it takes lr_end, power"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate: such as train.schedule_options='{min_lr_rate: 0.1}'"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", None, "needs num_decay_steps"),
        ("linear", 3, "train.schedule_options=3 is not a mapping: such as '{min_lr_rate: 0.1}', or null"),
    ],
)
def test_what_a_schedule_does_not_know_is_said_before_anything_is_loaded(name: str, options: object, says: str) -> None:
    assert says in " ".join(schedule_problems(name, options))


@pytest.mark.parametrize(
    ("name", "options", "times"),
    [
        ("polynomial", {"lr_end": 1.0}, Timetable(10)),
        ("polynomial", {}, Timetable(4, warmup_steps=4)),
        ("cosine_with_min_lr", {"min_lr": 0.1, "min_lr_rate": 0.1}, Timetable(10)),
        ("warmup_stable_decay", {"num_decay_steps": "few"}, Timetable(10)),
        ("warmup_stable_decay", {"num_decay_steps": 9}, Timetable(10, warmup_steps=2)),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "steep"}, Timetable(10)),
    ],
)
def test_values_that_a_schedule_cannot_use_are_one_clear_error(
    name: str, options: dict[str, Any], times: Timetable
) -> None:
    with pytest.raises(UserError, match=rf"train\.schedule={name} .*use train\.schedule=cosine"):
        build_schedule(optimizer(), TrainConfig(schedule=name, schedule_options=options), times)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_can_be_kept_in_a_checkpoint(name: str) -> None:
    """Its state is plain: what a checkpoint holds is JSON and tensors."""
    import json

    options = next(options for known, options in [*CURVES, ("constant", {})] if known == name)
    made = build_schedule(optimizer(), TrainConfig(schedule=name, schedule_options=options), Timetable(9))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        json.dumps(made.state_dict())
