"""A sweep's figures as data: what is drawn, for whatever draws it."""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from lora_exp.job import read_metrics
from lora_exp.sweep.axes import Axis, axis_of, is_number
from lora_exp.sweep.jobs import JobReport, grouped, is_replicate, text, title
from lora_exp.sweep.quantities import Quantity

MOST_SERIES = 24  # that a legend names
_FEW = 6  # points of which none is called far out
_MARGIN = 0.05


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

    @property
    def frame(self) -> tuple[float, float] | None:
        """What is shown of y, where a few values far out would leave no room for the others; None: all.

        Far out is beyond three times the quartiles' distance (Tukey 1977), and left out if that doubles the rest.
        """
        points = [point for each in self.series for point in each.points]
        values = [point.y for point in points]
        if len(values) < _FEW:
            return None
        first, _, third = statistics.quantiles(values, method="inclusive")
        fence = 3 * (third - first)
        near = [point for point in points if first - fence <= point.y <= third + fence]
        low = min(point.y if point.low is None else point.low for point in near)
        high = max(point.y if point.high is None else point.high for point in near)
        if not 0 < 2 * (high - low) < max(values) - min(values):
            return None
        margin = _MARGIN * (high - low)
        return low - margin, high + margin

    @property
    def told(self) -> str:
        """The note, and what lies beyond the frame."""
        if self.frame is None:
            return self.note
        low, high = self.frame
        beyond = sorted({point.y for each in self.series for point in each.points if not low < point.y < high})
        said = ", ".join(dict.fromkeys(f"{value:.4g}" for value in beyond))
        return "; ".join(filter(None, [self.note, f"beyond the frame: {said}"]))


def curves(jobs: list[JobReport], factors: list[str], result: Quantity) -> Figure | None:
    """``result`` over the steps, best first: a line for replicates together, one for each job that did not finish,
    which shows how far it came."""
    names = [name for name in factors if not is_replicate(name)] or factors
    done = [job for job in jobs if job.outcome.status == "FINISHED"]
    groups = [*grouped(done, names), *([job] for job in jobs if job.outcome.status != "FINISHED")]
    series = []
    for group in groups:
        first, status = group[0].outcome, group[0].outcome.status
        label = title(group[0], names if status == "FINISHED" else factors) or f"job {first.number}"
        points = _mean_curve(group, f"eval/{result.key}")
        series.append(Series(label if status == "FINISHED" else f"{label} ({status})", points))
    if not (drawn := [each for each in series if each.points]):
        return None
    note = _said(drawn)
    return Figure(
        f"{result.key}_curves", result.title, Axis("optimizer step"), Axis(result.label), _few_named(drawn), note=note
    )


def against_factors(jobs: list[JobReport], factors: list[str], result: Quantity) -> list[Figure]:
    """``result`` against each swept value; replicates against each other only if nothing else was swept."""
    chosen = [name for name in factors if not is_replicate(name)] or factors
    return [figure for name in chosen if (figure := _against(jobs, name, chosen, result))]


def against_cost(jobs: list[JobReport], factors: list[str], result: Quantity, cost: Quantity) -> Figure | None:
    """``result`` against what it cost, a point a job, a colour for each combination of what is not a number."""
    done = [job for job in jobs if result.of(job) is not None and cost.of(job) is not None]
    kinds = [name for name in factors if not all(is_number(job.value(name)) for job in done)]
    groups = [
        Series(title(group[0], kinds), [
            Point(cost.of(job) or 0.0, result.of(job) or 0.0, _note(job, factors)) for job in group
        ], joined=False)
        for group in grouped(done, kinds)
    ]  # fmt: skip
    points = [point for series in groups for point in series.points]
    if len({point.x for point in points}) < 2:
        return None
    return Figure(
        f"{result.key}_against_{cost.key}",
        f"{result.title} against {cost.title}",
        axis_of([point.x for point in points], cost.label, ticks=False),
        Axis(result.label),
        _few_named(groups),
        _front(points, result.higher_is_better),
        "dotted: the Pareto front, which no job betters in both",
    )


def _against(jobs: list[JobReport], factor: str, factors: list[str], result: Quantity) -> Figure | None:
    others = [name for name in factors if name != factor]
    in_order = sorted(jobs, key=lambda job: job.outcome.number)
    axis = axis_of([job.value(factor) for job in in_order if result.of(job) is not None], factor)
    every, jobs = jobs, [job for job in jobs if result.of(job) is not None and axis.has(job.value(factor))]
    if len({axis.place(job.value(factor)) for job in jobs}) < 2:
        return None
    if alone := is_replicate(factor):
        axis = Axis(factor, categories=sorted({text(job.value(factor)) for job in jobs}, key=_natural))
    groups = grouped(jobs, others)
    is_sparse = 2 * sum(len(grouped(group, [factor])) > 1 for group in groups) < len(groups)
    named = [("", jobs)] if is_sparse else [(title(group[0], others), group) for group in groups]
    # Between categories there is nothing, but a line shows which points belong together.
    joined = not (is_sparse or alone or (axis.categories and len(named) == 1))
    series = [Series(label, _means(group, axis, factor, result), joined) for label, group in named]
    told = [f"{', '.join(others)} differ too, from point to point"] if is_sparse else []
    told += [f"{_jobs(missing)} without a result or a place here"] if (missing := len(every) - len(jobs)) else []
    name = re.sub(r"[^\w.]+", "_", f"{result.key}_against_{factor}")
    heading = f"{result.title} against {factor}"
    return Figure(name, heading, axis, Axis(result.label), _few_named(series), note=_said(series, *told))


def _means(jobs: list[JobReport], axis: Axis, factor: str, result: Quantity) -> list[Point]:
    placed: dict[float | str, list[JobReport]] = defaultdict(list)
    for job in jobs:
        placed[axis.place(job.value(factor))].append(job)
    points = []
    for x in sorted(placed, key=axis.order):
        values = [value for job in placed[x] if (value := result.of(job)) is not None]
        points.append(_mean(x, values, ", ".join(_note(job, []) for job in placed[x])))
    return points


def _mean_curve(jobs: list[JobReport], key: str) -> list[Point]:
    at: dict[float, list[float]] = defaultdict(list)
    for job in jobs:
        for record in read_metrics(job.folder):
            if is_number(record.get(key)):
                at[record["step"]].append(record[key])
    note = ", ".join(f"job {job.outcome.number}" for job in jobs)
    return [_mean(step, at[step], note) for step in sorted(at)]


def _mean(x: float | str, values: list[float], note: str) -> Point:
    low, high = min(values), max(values)
    mean = min(max(sum(values) / len(values), low), high)  # rounding may put the mean of equal values beside them
    return Point(x, mean, note, *((low, high) if len(values) > 1 else ()))


def _jobs(count: int) -> str:
    return f"{count} job{'s' * (count > 1)}"


def _said(series: list[Series], *parts: str) -> str:
    is_mean = any(point.low is not None for each in series for point in each.points)
    means = "mean of the jobs at a point, the bar from the lowest to the highest"
    return "; ".join([*parts, *([means] if is_mean else [])])


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
