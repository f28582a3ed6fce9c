"""Schedules against transformers', which everyone compares with."""

from __future__ import annotations

import pytest
import torch
from transformers import get_scheduler

from lora_exp.config import OptimizerConfig, TrainConfig
from lora_exp.training.optimizers import build_optimizer, build_schedule


def rates(schedule: torch.optim.lr_scheduler.LRScheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(schedule.get_last_lr()[0])
        schedule.optimizer.step()
        schedule.step()
    return seen


@pytest.mark.parametrize(
    ("name", "theirs"), [("cosine", "cosine"), ("linear", "linear"), ("constant", "constant_with_warmup")]
)
@pytest.mark.parametrize("warmup", [0, 3])
def test_schedules_are_those_of_transformers(name: str, theirs: str, warmup: int) -> None:
    def optimizer() -> torch.optim.Optimizer:
        return build_optimizer([torch.nn.Parameter(torch.zeros(1))], OptimizerConfig("adamw", lr=0.1))

    mine = build_schedule(optimizer(), TrainConfig(steps=10, warmup_steps=warmup, schedule=name))
    expected = get_scheduler(theirs, optimizer(), num_warmup_steps=warmup, num_training_steps=10)
    assert rates(mine, 12) == pytest.approx(rates(expected, 12))
