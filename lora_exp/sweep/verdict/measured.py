"""What the replicates of arms came to: on the test rows if all have looked at them, else on the validation rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lora_exp.job import Result, read_test_rows
from lora_exp.sweep.jobs import JobReport
from lora_exp.sweep.verdict.arms import Arm, validation_of
from lora_exp.sweep.verdict.judging import Replicate, Sample


@dataclass(frozen=True)
class Measured:
    """A sample an arm, of the ``split``. ``rows``: how many rows are known one by one; 0: none.

    ``is_one_data``: whether every job had the same data.
    """

    samples: list[Sample]
    split: str
    rows: int
    is_one_data: bool


def measured(arms: Sequence[Arm], metric: str) -> Measured:
    """Rows are known one by one where every job has the same ones, and where they add up to the metric."""
    jobs = [job for arm in arms for job in arm.jobs.values()]
    is_tested = all(math.isfinite(_tested(job, metric)) for job in jobs)
    value = _tested if is_tested else validation_of
    is_one_data = _is_one_data(jobs)
    columns = {id(job): _column(job, value(job, metric)) for job in jobs} if is_tested and is_one_data else {}
    if not columns or not all(columns.values()):
        columns = {}
    samples = [
        Sample(arm.label, {seed: Replicate(value(job, metric), *(columns.get(id(job)) or ()))
                           for seed, job in arm.jobs.items() if math.isfinite(value(job, metric))})
        for arm in arms
    ]  # fmt: skip
    rows = {len(found[1]) for found in columns.values() if found}
    return Measured(samples, "test" if is_tested else "validation", rows.pop() if len(rows) == 1 else 0, is_one_data)


def _is_one_data(jobs: Sequence[JobReport]) -> bool:
    return len({job.outcome.result.data_fingerprint for job in jobs if isinstance(job.outcome.result, Result)}) == 1


def _tested(job: JobReport, metric: str) -> float:
    result = job.outcome.result
    return result.test.get(metric, math.nan) if isinstance(result, Result) else math.nan


def _column(job: JobReport, value: float) -> tuple[np.ndarray, np.ndarray] | None:
    """What the metric is the mean of, a row each, over the row's predictions; None where it is no such mean."""
    rows = {name: np.array(values, float) for name, values in read_test_rows(job.folder).items()}
    counts = rows.pop("count", np.zeros(0))
    if not counts.sum():
        return None
    found = [totals for totals in rows.values() if math.isclose(totals.sum() / counts.sum(), value, rel_tol=1e-6)]
    return (found[0], counts) if found else None
