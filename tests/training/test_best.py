"""Which evaluation is the best, and when to stop: against transformers' EarlyStoppingCallback."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
from transformers import EarlyStoppingCallback, TrainerControl, TrainerState, TrainingArguments

from lora_exp.training.best import Best


def fed(best: Best, values: list[float]) -> list[bool]:
    return [best.note({"step": step, best.metric: value}) for step, value in enumerate(values)]


@pytest.mark.parametrize("higher", [False, True])
def test_it_is_the_lowest_or_the_highest_and_the_first_of_equals(higher: bool) -> None:
    sign = -1 if higher else 1
    best = Best(higher_is_better=higher)
    assert fed(best, [sign * value for value in (0.5, 3, 2, 2, 4, 1)]) == [False, True, True, False, False, True]
    assert (best.step, best.value) == (5, sign * 1)


def test_what_was_before_the_first_step_and_what_is_seen_twice_is_no_candidate() -> None:
    best = Best(patience=2)
    assert not best.note({"step": 0, "eval/loss": 0.1})
    assert best.note({"step": 4, "eval/loss": 1.0})
    assert best.note({"step": 4, "eval/loss": 1.0})
    assert not best.note({"step": 5, "train/loss": 0.1})
    assert not any(best.note({"step": 8, "eval/loss": 2.0}) for _ in range(3))
    assert (best.without_gain, best.should_stop) == (1, False)


def test_a_nan_is_the_best_only_where_there_is_nothing_else() -> None:
    best = Best()
    assert fed(best, [0, math.nan, math.nan, 3, math.nan, 2]) == [False, True, False, True, False, True]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("min_delta", [0.0, 0.3])
@pytest.mark.parametrize("patience", [1, 3])
def test_it_stops_where_transformers_does(higher: bool, min_delta: float, patience: int, tmp_path: Path) -> None:
    arguments = TrainingArguments(
        str(tmp_path), metric_for_best_model="loss", greater_is_better=higher, load_best_model_at_end=True,
        eval_strategy="steps", save_strategy="steps", eval_steps=1, save_steps=1, report_to=[], use_cpu=True,
    )  # fmt: skip
    for seed in range(40):
        values = [round(random.Random(f"{seed} {step}").uniform(0, 2), 1) for step in range(12)]
        theirs, state = EarlyStoppingCallback(patience, min_delta), TrainerState()
        ours = Best(higher_is_better=higher, patience=patience, min_delta=min_delta)
        for step, value in enumerate(values, start=1):
            control = theirs.on_evaluate(arguments, state, given := TrainerControl(), metrics={"eval_loss": value})
            if state.best_metric is None or (value > state.best_metric if higher else value < state.best_metric):
                state.best_metric = value  # as its Trainer does after each evaluation
            ours.note({"step": step, "eval/loss": value})
            assert ours.value == state.best_metric
            assert ours.should_stop == (control or given).should_training_stop


def test_its_state_is_plain_json_and_goes_on() -> None:
    whole, first, second = (Best(patience=2) for _ in range(3))
    values = [0.0, 3.0, 2.0, 2.5]
    fed(whole, [*values, 2.2])
    fed(first, values)
    second.restore(json.loads(json.dumps(first.state())))
    second.note({"step": 4, "eval/loss": 2.2})
    assert second == whole
    assert second.should_stop
