"""What jobs are compared by in figures: what came of them, and what it cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from lora_exp.job import PlanResult, Result
from lora_exp.sweep.jobs import JobReport
from lora_exp.training.metrics import metrics


@dataclass(frozen=True)
class Quantity:
    """A figure of a job's: ``of`` is None for a job that has none. ``key`` is its name in files of ours."""

    key: str
    label: str
    of: Callable[[JobReport], float | None]
    higher_is_better: bool = False

    @property
    def title(self) -> str:
        """Its label without the unit."""
        return self.label.partition(" (")[0]


def results_of(jobs: list[JobReport]) -> list[Quantity]:
    """What came of the jobs: loss and each metric that need not follow it (a higher one is better), or a plan's GiB."""
    found = [
        Quantity("loss", "validation loss (nats per prediction)", _of(Result, lambda result: result.eval_loss)),
        *(_metric(name) for name in _rising(jobs)),
        Quantity("memory", "planned memory (GiB)", _of(PlanResult, lambda result: result.total_gib)),
    ]
    return [quantity for quantity in found if any(quantity.of(job) is not None for job in jobs)]


def costs_of(jobs: list[JobReport]) -> list[Quantity]:
    """What they cost; what is the same for all of them is left out."""
    found = [
        Quantity("parameters", "trainable parameters", lambda job: _trainable(job)),
        Quantity("time", "wall time (s)", _of(Result, lambda result: result.wall_s)),
        Quantity("memory", "peak memory (GiB)", _of(Result, lambda result: result.peak_memory_gib)),
    ]
    return [cost for cost in found if len({cost.of(job) for job in jobs} - {None}) > 1]


def _of(kind: type, value: Callable[..., float]) -> Callable[[JobReport], float | None]:
    def of(job: JobReport) -> float | None:
        result = job.outcome.result
        return _finite(value(result)) if isinstance(result, kind) else None

    return of


def _metric(name: str) -> Quantity:
    def of(result: Result) -> float:
        return result.metrics.get(name, math.nan)

    return Quantity(name, f"validation {name}", _of(Result, of), higher_is_better=True)


def _rising(jobs: list[JobReport]) -> list[str]:
    results = [job.outcome.result for job in jobs]
    names = dict.fromkeys(name for result in results if isinstance(result, Result) for name in result.metrics)
    return [name for name in names if name in metrics.names() and metrics[name].better == "higher"]


def _trainable(job: JobReport) -> float | None:
    result = job.outcome.result
    return float(result.trainable) if isinstance(result, (Result, PlanResult)) else None


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
