"""Parallel coordinates: a line a job through everything that was swept to what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lora_exp.sweep.axes import Axis, axis_of, is_number
from lora_exp.sweep.jobs import JobReport, is_replicate, title
from lora_exp.sweep.quantities import Quantity

FROM_FACTORS = 3
_TICKS = 5


@dataclass(frozen=True)
class Dimension:
    """An upright axis: a ``position`` for each job, and what stands at which position."""

    label: str
    positions: list[float]
    ticks: dict[float, str]


@dataclass(frozen=True)
class Parallel:
    """The last dimension is the result, which is also what the lines are coloured by."""

    name: str
    title: str
    dimensions: list[Dimension]
    notes: list[str]
    higher_is_better: bool


def parallel_of(jobs: list[JobReport], factors: list[str], result: Quantity) -> Parallel | None:
    """From three swept values on that are no replicates; of jobs that have a result and a value for each."""
    factors = [name for name in factors if not is_replicate(name)]
    done = [job for job in jobs if result.of(job) is not None]
    axes = {name: axis_of([job.value(name) for job in done], name) for name in factors} if done else {}
    done = [job for job in done if all(axis.has(job.value(name)) for name, axis in axes.items())]
    if len(axes) < FROM_FACTORS or len(done) < 2:
        return None
    dimensions = [_dimension([job.value(name) for job in done], axis) for name, axis in axes.items()]
    outcome = [result.of(job) or 0.0 for job in done]
    dimensions.append(_dimension(list(outcome), axis_of([*outcome], result.title, ticks=False)))
    notes = [f"job {job.outcome.number} {title(job, factors)}" for job in done]
    name = f"{result.key}_parallel"
    return Parallel(name, f"{result.title} of every combination", dimensions, notes, result.higher_is_better)


def _dimension(values: list[object], axis: Axis) -> Dimension:
    if axis.categories:
        positions = [axis.order(axis.place(value)) for value in values]
        return Dimension(axis.label, positions, {float(index): name for index, name in enumerate(axis.categories)})
    numbers = [float(value) for value in values if is_number(value)]
    move = math.log10 if axis.is_log else float
    positions = [move(number) for number in numbers]
    named = axis.ticks or _spread(min(numbers), max(numbers), axis.is_log)
    return Dimension(axis.label, positions, {move(number): f"{number:.4g}" for number in named})


def _spread(low: float, high: float, is_log: bool) -> list[float]:
    steps = [index / (_TICKS - 1) for index in range(_TICKS)] if high > low else [0.0]
    if is_log:
        return [low * (high / low) ** step for step in steps]
    return [low + (high - low) * step for step in steps]
