"""What a person sees while a run trains, where there is no terminal."""

from __future__ import annotations

import logging

import pytest

from lora_exp import progress
from lora_exp.progress import TrainingProgress


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> list[str]:
    """The lines of a run of ten steps, of 6 s each, that were seen from step 4 on, an hour after its begin."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, "lora_exp.progress")
    shown = TrainingProgress(10)
    clock[0] = 3600.0
    shown.show({"step": 3, "written/number_match": 0.0})
    shown.show({"step": 3, "eval/loss": 2.0, "eval/perplexity": 7.4})
    for step in range(4, 7):
        clock[0] += 6.0
        shown.show({"step": step, "train/loss": 1.5, "train/lr": 1e-3, "train/tokens_per_s": 8.0})
    return caplog.messages


def test_what_is_left_is_reckoned_from_the_steps_of_this_process(said: list[str]) -> None:
    """Neither the hour of an evaluation before nor the steps of an earlier process count."""
    assert said[-2:] == [
        "step    5/10  loss 1.5000  lr 1.00e-03  8 tokens/s  ETA 0:30",
        "step    6/10  loss 1.5000  lr 1.00e-03  8 tokens/s  ETA 0:24",
    ]


def test_nothing_is_reckoned_from_one_step_and_no_line_is_empty(said: list[str]) -> None:
    assert said[0] == "step    3/10  validation loss 2.0000  perplexity 7.40"
    assert said[1] == "step    4/10  loss 1.5000  lr 1.00e-03  8 tokens/s"
