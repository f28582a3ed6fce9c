"""Sweepers that stop at failed jobs, as Optuna's does at the first: nobody would know that it can be told not to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lora_exp.job import RESULT_FILE, read_outcome

SETTING = "hydra.sweeper.max_failure_rate"


@dataclass(frozen=True)
class Limit:
    """The share of a batch's jobs that may fail, and how many trials there are to be."""

    rate: float
    trials: int


def limit_of(composed: DictConfig) -> Limit | None:
    """That of a sweep's sweeper, if it has one."""
    rate, trials = OmegaConf.select(composed, SETTING), OmegaConf.select(composed, "hydra.sweeper.n_trials")
    return None if rate is None or trials is None else Limit(float(rate), int(trials))


def said_if_stopped(folder: Path, limit: Limit) -> str | None:
    """What to do where the sweep in ``folder`` had fewer jobs than it was to have, some of which failed."""
    outcomes = [read_outcome(file.parent) for file in folder.rglob(RESULT_FILE)]
    failed = sum(outcome is not None and outcome.status == "FAILED" for outcome in outcomes)
    if not failed or len(outcomes) >= limit.trials:
        return None
    return (
        f"The sweep ended after {len(outcomes)} of {limit.trials} trials, as more of them failed than "
        f"{SETTING}={limit.rate:g} allows: {SETTING}=1 goes on past failed jobs"
    )
