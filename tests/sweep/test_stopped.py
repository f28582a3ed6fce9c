"""A sweep that its sweeper ends because jobs fail says how not to."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp.sweep.stopped import Limit, limit_of, said_if_stopped


@pytest.mark.parametrize(
    ("sweeper", "expected"),
    [
        ({"max_failure_rate": 0.0, "n_trials": 20}, Limit(0.0, 20)),
        ({"max_batch_size": None}, None),
    ],
)
def test_only_some_sweepers_have_a_limit(sweeper: dict[str, Any], expected: Limit | None) -> None:
    assert limit_of(OmegaConf.create({"hydra": {"sweeper": sweeper}})) == expected


@pytest.mark.parametrize(("trials", "failing", "said"), [(20, (2,), True), (3, (2,), False), (20, (), False)])
def test_it_is_said_where_trials_are_missing_and_some_failed(
    trials: int, failing: tuple[int, ...], said: bool, tmp_path: Path, made_up: Any
) -> None:
    made_up.sweep(tmp_path, swept={"rank": [2, 4, 8]}, failing=failing)
    text = said_if_stopped(tmp_path, Limit(0.0, trials))
    assert (text is not None) is said
    if text is not None:
        assert "after 3 of 20 trials" in text
        assert "hydra.sweeper.max_failure_rate=1 goes on" in text


@pytest.mark.filterwarnings("ignore::FutureWarning:optuna")
def test_optunas_end_at_a_nan_names_the_setting_and_what_was_tried(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path
) -> None:
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    overrides = [*tiny_overrides, "tracking=none", "train.max_grad_norm=inf", "optimizer.lr=choice(1e30,1e-3)"]
    optuna = ["hydra/sweeper=optuna", "hydra.sweeper.n_trials=6", "hydra.sweeper.n_jobs=1"]
    optuna += ["hydra.sweeper.sampler.seed=1"]
    ends = cli("-m", *overrides, *optuna)
    assert ends.code == 1
    assert re.search(r"ended after [1-5] of 6 trials", ends.err)
    assert "optimizer.lr" in ends.out.split("Sweep, best first")[1]
    goes_on = cli("-m", *overrides, *optuna, "hydra.sweeper.max_failure_rate=1")
    assert "max_failure_rate=1 goes" not in goes_on.err
    assert 1 <= goes_on.out.count("FAILED: ") < 6
    assert "Best value" in goes_on.out
