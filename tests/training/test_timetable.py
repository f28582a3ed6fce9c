"""Epochs, intervals and warm-up in optimizer steps: arithmetic against HF's Trainer and against counting."""

from __future__ import annotations

import itertools
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_exp.config import TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.timetable import Timetable, micro_batches_of, parse_interval


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.layer(x).sum()}


class Counted(TrainerCallback):
    """How many micro batches each optimizer step takes, and after which there is an evaluation."""

    def __init__(self) -> None:
        self.micro, self.now = [], 1

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self.now += 1

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.micro.append(self.now)
        self.now = 1


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize(
    ("rows", "size", "accumulate", "epochs", "warmup"),
    [(10, 2, 2, 1.0, 0.5), (11, 2, 2, 2.5, 0.1), (8, 8, 1, 3.0, 0.0), (8, 1, 8, 3.0, 0.03), (7, 2, 8, 1.5, 1.0)],
)
def test_epochs_are_those_of_hf_trainer(
    rows: int, size: int, accumulate: int, epochs: float, warmup: float, drop_last: bool, tmp_path: Path
) -> None:
    counted = Counted()
    arguments = TrainingArguments(
        str(tmp_path), num_train_epochs=epochs, per_device_train_batch_size=size, report_to=[], use_cpu=True,
        gradient_accumulation_steps=accumulate, dataloader_drop_last=drop_last, save_strategy="no", disable_tqdm=True,
        logging_strategy="no", warmup_steps=warmup if warmup < 1 else 0,
    )  # fmt: skip
    data = [{"x": torch.ones(1)} for _ in range(rows)]
    trainer = Trainer(Net(), arguments, train_dataset=data, callbacks=[counted])
    trainer.train()
    section = TrainConfig(
        epochs=epochs, micro_batch_size=size, grad_accum_steps=accumulate, drop_last=drop_last, warmup_ratio=warmup
    )
    mine = Timetable.of(section, micro_batches_of(rows, size, drop_last))
    assert mine.steps == trainer.state.max_steps == len(counted.micro)
    assert [mine.micro_batches(step) for step in range(1, mine.steps + 1)] == counted.micro
    if warmup < 1:
        assert mine.warmup_steps == arguments.get_warmup_steps(mine.steps)


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 4))
def test_an_epoch_takes_every_micro_batch_once(micro_batches: int, accumulate: int, epochs: int) -> None:
    mine = Timetable.of(TrainConfig(epochs=epochs, grad_accum_steps=accumulate), micro_batches)
    taken = [mine.micro_batches(step) for step in range(1, mine.steps + 1)]
    assert mine.epoch_steps is not None
    assert all(
        sum(taken[start : start + mine.epoch_steps]) == micro_batches
        for start in range(0, mine.steps, mine.epoch_steps)
    )
    assert mine.epochs(mine.steps) == epochs
    assert all(1 <= count <= accumulate for count in taken)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (12, 12), ("12", 12), ("12 steps", 12), ("1 step", 1), ("1 epoch", 10), ("epoch", 10), ("0.5 epoch", 5),
        ("2 epochs", 20), ("0.25epoch", Fraction(5, 2)), (".5 epochs", 5), (12.0, 12),
        (0, None), (None, None), ("0", None), ("0 epochs", None),
    ],
)  # fmt: skip
def test_an_interval_is_steps_or_epochs(value: object, steps: Fraction | int | None) -> None:
    found = parse_interval("train.eval_every", value)
    assert (None if found is None else found.in_steps(10)) == steps


@pytest.mark.parametrize("value", ["often", "half an epoch", -1, "-1 epoch", 0.5, "1.5 steps", True, "", " ", "e", []])
def test_any_other_interval_is_one_clear_error(value: object) -> None:
    with pytest.raises(UserError, match=r"train\.eval_every=.* is no interval: use a number of optimizer steps"):
        parse_interval("train.eval_every", value)


@given(st.fractions("0.01", 3), st.integers(1, 30), st.integers(1, 4))
def test_as_many_times_an_epoch_as_it_says(share: Fraction, micro_batches: int, epochs: int) -> None:
    """However odd the share: after step k there have been as many as fit into k steps, at most one a step."""
    text = f"{float(share):.4f} epoch"
    mine = Timetable.of(TrainConfig(epochs=epochs, eval_every=text), micro_batches)
    if mine.eval_every is None:
        return
    due = [step for step in range(1, mine.steps) if mine.evaluates(step)]
    width = max(Fraction(text.split()[0]) * micro_batches, Fraction(1))
    assert abs(len(due) - (mine.steps - 1) // width) <= 1
    assert mine.evaluates(mine.steps)


def test_half_an_epoch_of_seven_steps_does_not_drift() -> None:
    mine = Timetable.of(TrainConfig(epochs=4, eval_every="0.5 epoch", log_every="1 epoch", save_every=0), 7)
    steps = range(1, mine.steps + 1)
    assert [step for step in steps if mine.evaluates(step)] == [4, 7, 11, 14, 18, 21, 25, 28]
    assert [step for step in steps if mine.logs(step)] == [7, 14, 21, 28]
    assert not any(map(mine.saves, steps))


@pytest.mark.parametrize(
    ("fields", "steps", "warmup"),
    [
        ({}, 24, 2),
        ({"steps": 1}, 1, 1),
        ({"steps": 100, "warmup_ratio": 0.07}, 100, 7),  # and not 8, as the product of floats would have it
        ({"epochs": 2.5}, 25, 2),
        ({"epochs": 1.1}, 11, 2),
        ({"epochs": 0.01}, 1, 1),
        ({"epochs": 3, "warmup_steps": 30}, 30, 30),
        ({"steps": 5, "warmup_steps": 0}, 5, 0),
    ],
)
def test_lengths_and_warm_ups(fields: dict[str, Any], steps: int, warmup: int) -> None:
    mine = Timetable.of(TrainConfig(**fields), 10)
    assert (mine.steps, mine.warmup_steps) == (steps, warmup)


@pytest.mark.parametrize(
    ("fields", "micro_batches", "says"),
    [
        ({"epochs": 1}, None, r"train\.epochs=1: the data is streamed.*give train\.steps instead"),
        ({"eval_every": "1 epoch"}, None, r"train\.eval_every=1 epoch: the data is streamed.*count in steps"),
        ({"epochs": 1, "warmup_steps": 11}, 10, r"train\.warmup_steps=11 is outside \[0, 10\].*train\.warmup_ratio"),
        ({"epochs": 1, "steps": 2}, 10, r"train\.steps=2 and train\.epochs=1 are two lengths.*train\.steps=null"),
    ],
)
def test_what_cannot_be_is_one_clear_error(fields: dict[str, Any], micro_batches: int | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Timetable.of(TrainConfig(**fields), micro_batches)


def test_streamed_data_is_counted_in_steps_and_every_step_is_whole() -> None:
    mine = Timetable.of(TrainConfig(steps=7, grad_accum_steps=3, eval_every=3), None)
    assert [mine.micro_batches(step) for step in range(1, 8)] == [3] * 7
    assert [step for step in itertools.chain(range(1, 8)) if mine.evaluates(step)] == [3, 6, 7]
    assert mine.epochs(3) is None
