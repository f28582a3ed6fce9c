"""A sweep's jobs as arms: the combinations that are compared, each with its replicates and its tuned values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from lora_exp.config import StudyConfig
from lora_exp.job import Result
from lora_exp.sweep.jobs import JobReport, grouped, is_replicate, text, title
from lora_exp.training.metrics import higher_is_better

LOOKS = "train.test"  # a job that tunes has it off


@dataclass(frozen=True)
class Arm:
    """``jobs`` are its replicates with the ``tuned`` values, by their seeds.

    ``tried``: of each tuned key the values that there were; ``on_edge``: those keys of which the best value is the
    lowest or the highest one.
    """

    label: str
    jobs: dict[str, JobReport]
    tuned: dict[str, object] = field(default_factory=dict)
    tried: dict[str, list[object]] = field(default_factory=dict)

    @property
    def on_edge(self) -> list[str]:
        return [key for key, value in self.tuned.items() if is_on_edge(value, self.tried[key])]


def arms_of(jobs: Sequence[JobReport], names: Sequence[str], study: StudyConfig) -> list[Arm]:
    """The arms, by what was swept (``names``); one without a finished training is none.

    Where some jobs left the test rows alone, those tuned, and the others tell what came of it.
    """
    trained = [job for job in jobs if isinstance(job.outcome.result, Result)]
    factors = [name for name in names if not is_replicate(name) and name not in (*study.tune, LOOKS)]
    tuned = [name for name in study.tune if name in names]
    order = sorted(trained, key=lambda job: job.outcome.number)
    found = (_arm(title(group[0], factors) or "all", group, tuned, study.metric)
             for group in grouped(order, factors))  # fmt: skip
    return [arm for arm in found if arm.jobs]


def validation_of(job: JobReport, metric: str) -> float:
    """What a job came to on the validation rows; nan without."""
    result = job.outcome.result
    if not isinstance(result, Result):
        return math.nan
    return result.eval_loss if metric == "loss" else result.metrics.get(metric, math.nan)


def is_on_edge(value: object, tried: Sequence[object]) -> bool:
    """Whether the best value may lie beyond those that were tried, of numbers."""
    numbers = [each for each in tried if isinstance(each, (int, float)) and not isinstance(each, bool)]
    return len(numbers) == len(tried) and bool(numbers) and value in (min(numbers), max(numbers))


def replicate_of(job: JobReport) -> str:
    """Which replicate a job is: its seed, and that of its sample."""
    return " ".join(f"{text(value)}" for name, value in sorted(job.outcome.values.items()) if is_replicate(name))


def demerit(jobs: Sequence[JobReport], seeds: int, metric: str) -> float:
    """By which the values of ``jobs`` are chosen, lowest first: the mean by validation; of fewer than ``seeds``, as
    some failed, infinity."""
    found = [validation_of(job, metric) for job in jobs]
    if len(found) < seeds or not all(map(math.isfinite, found)):
        return math.inf
    mean = sum(found) / len(found)
    return -mean if higher_is_better(f"eval/{metric}") else mean


def _arm(label: str, jobs: list[JobReport], tuned: list[str], metric: str) -> Arm:
    tuning = [job for job in jobs if job.value(LOOKS) is False] or jobs
    confirming = [job for job in jobs if job.value(LOOKS) is not False]
    values = grouped(tuning, tuned)
    best = min(values, key=lambda group: demerit(group, max(map(len, values)), metric))[0]
    chosen_values = {key: best.value(key) for key in tuned}
    tried = {key: list(dict.fromkeys(job.value(key) for job in tuning)) for key in tuned}
    chosen = [job for job in confirming if all(job.value(key) == value for key, value in chosen_values.items())]
    return Arm(label, {replicate_of(job): job for job in chosen}, chosen_values, tried)
