"""A sweep's figures as data: what is drawn, for whatever draws it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_exp.job import read_metrics
from lora_exp.sweep.axes import Axis, axis_of, is_number
from lora_exp.sweep.jobs import JobReport, is_replicate, text, title
from lora_exp.sweep.quantities import Quantity

MOST_SERIES = 24  # that a legend names


@dataclass(frozen=True)
class Point:
    """``x``, on an axis of categories, is one of them. ``low`` and ``high`` span the replicates that ``y`` is the
    mean of. ``note`` says which job it is."""

    x: float | str
    y: float
    note: str = ""
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """Points of one label, ``joined`` by a line or not. A ``muted`` one is among those that nobody can tell apart."""

    label: str
    points: list[Point]
    joined: bool = True
    muted: bool = False


@dataclass(frozen=True)
class Figure:
    """``name`` is its file's. ``front``: the points that no other one betters in both x and y."""

    name: str
    title: str
    x: Axis
    y: Axis
    series: list[Series]
    front: list[Point] = field(default_factory=list)
    note: str = ""


def curves(jobs: list[JobReport], factors: list[str], result: Quantity) -> Figure | None:
    """``result`` over the steps, a line a job, best first; a job that failed shows how far it came."""
    series = []
    for job in jobs:
        records = [record for record in read_metrics(job.folder) if is_number(record.get(f"eval/{result.key}"))]
        points = [Point(record["step"], record[f"eval/{result.key}"], _note(job, factors)) for record in records]
        unfinished = "" if job.outcome.status == "FINISHED" else f" ({job.outcome.status})"
        series.append(Series((title(job, factors) or f"job {job.outcome.number}") + unfinished, points))
    drawn = [each for each in series if each.points]
    if not drawn:
        return None
    x = Axis("optimizer step")
    return Figure(f"{result.key}_curves", result.title, x, Axis(result.label), _few_named(drawn))


def against_factors(jobs: list[JobReport], factors: list[str], result: Quantity) -> list[Figure]:
    """``result`` against each swept value; replicates against each other only if nothing else was swept."""
    done = [job for job in jobs if result.of(job) is not None]
    chosen = [name for name in factors if not is_replicate(name)] or factors
    return [figure for name in chosen if (figure := _against(done, name, chosen, result))]


def against_cost(jobs: list[JobReport], factors: list[str], result: Quantity, cost: Quantity) -> Figure | None:
    """``result`` against what it cost, a point a job, a colour for each combination of what is not a number."""
    done = [job for job in jobs if result.of(job) is not None and cost.of(job) is not None]
    kinds = [name for name in factors if not all(is_number(job.value(name)) for job in done)]
    grouped: dict[str, list[Point]] = defaultdict(list)
    for job in done:
        grouped[title(job, kinds)].append(Point(cost.of(job) or 0.0, result.of(job) or 0.0, _note(job, factors)))
    points = [point for group in grouped.values() for point in group]
    if len({point.x for point in points}) < 2:
        return None
    series = _few_named([Series(label, group, joined=False) for label, group in grouped.items()])
    x = axis_of([point.x for point in points], cost.label, ticks=False)
    name, heading = f"{result.key}_against_{cost.key}", f"{result.title} against {cost.title}"
    return Figure(name, heading, x, Axis(result.label), series, _front(points, result.higher_is_better))


def _against(jobs: list[JobReport], factor: str, factors: list[str], result: Quantity) -> Figure | None:
    others = [name for name in factors if name != factor]
    axis = axis_of([job.value(factor) for job in sorted(jobs, key=lambda job: job.outcome.number)], factor)
    jobs = [job for job in jobs if axis.has(job.value(factor))]
    if len({axis.place(job.value(factor)) for job in jobs}) < 2:
        return None
    if alone := is_replicate(factor):
        axis = Axis(factor, categories=sorted({text(job.value(factor)) for job in jobs}, key=_natural))
    grouped: dict[str, list[JobReport]] = defaultdict(list)
    for job in jobs:
        grouped[title(job, others)].append(job)
    lines = [group for group in grouped.values() if len({text(job.value(factor)) for job in group}) > 1]
    is_sparse = 2 * len(lines) < len(grouped)
    if is_sparse:
        grouped = {"": jobs}
    joined = not (is_sparse or alone)
    series = [Series(label, _means(group, axis, factor, result), joined) for label, group in grouped.items()]
    name = re.sub(r"[^\w.]+", "_", f"{result.key}_against_{factor}")
    return Figure(
        name, f"{result.title} against {factor}", axis, Axis(result.label), _few_named(series),
        note=_said(series, is_sparse, others),
    )  # fmt: skip


def _means(jobs: list[JobReport], axis: Axis, factor: str, result: Quantity) -> list[Point]:
    placed: dict[float | str, list[JobReport]] = defaultdict(list)
    for job in jobs:
        placed[axis.place(job.value(factor))].append(job)
    points = []
    for x in sorted(placed, key=axis.order):
        values = [value for job in placed[x] if (value := result.of(job)) is not None]
        span = (min(values), max(values)) if len(values) > 1 else (None, None)
        note = ", ".join(f"job {job.outcome.number}" for job in placed[x])
        points.append(Point(x, sum(values) / len(values), note, *span))
    return points


def _said(series: list[Series], is_sparse: bool, others: list[str]) -> str:
    parts = []
    if is_sparse and others:
        parts.append(f"{', '.join(others)} differ too, from point to point")
    if any(point.low is not None for each in series for point in each.points):
        parts.append("mean of the jobs at a point, the bar from the lowest to the highest")
    return "; ".join(parts)


def _few_named(series: list[Series]) -> list[Series]:
    """Of too many for a legend the first, which are the best, keep their names."""
    if len(series) <= MOST_SERIES:
        return sorted(series, key=lambda each: _natural(each.label))
    named, others = series[: MOST_SERIES // 2], series[MOST_SERIES // 2 :]
    label = f"{len(others)} others"
    muted = [Series(label, each.points, each.joined, muted=True) for each in others]
    return [*muted, *sorted(named, key=lambda each: _natural(each.label))]


def _front(points: Iterable[Point], higher_is_better: bool) -> list[Point]:
    sign = -1 if higher_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.x, sign * point.y)):
        if not front or sign * point.y < sign * front[-1].y:
            front.append(point)
    return front


def _note(job: JobReport, factors: list[str]) -> str:
    return f"job {job.outcome.number} {title(job, factors)}".strip()


def _natural(label: str) -> list[tuple[int, float, str]]:
    """So that rank=16 stands behind rank=8."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", label)
    return [(0, float(part), "") if index % 2 else (1, 0.0, part) for index, part in enumerate(parts)]
