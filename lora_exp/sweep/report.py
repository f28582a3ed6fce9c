"""The comparison of a sweep's jobs: what differs between them, and what came of it, best first."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_exp.job import (
    RESULT_FILE,
    AnyResult,
    Outcome,
    PlanResult,
    Result,
    SyncResult,
    UseResult,
    read_metrics,
    read_outcome,
    shown,
)
from lora_exp.listed import KNOBS
from lora_exp.plots import final_loss, loss_curves
from lora_exp.sweep.lost import note_lost
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.sweeps import SweepRun

# Each with how a result shows it; metrics come behind the loss. A column that is empty for every job is left out.
RESULT_COLUMNS: dict[str, Callable[[Result], str]] = {
    "eval/loss": lambda result: f"{result.eval_loss:.4f}",
    "trainable": lambda result: f"{result.trainable:,}",
    "base MB": lambda result: "" if result.base_weight_bytes is None else f"{result.base_weight_bytes / 1e6:.1f}",
    "adapter MB": lambda result: f"{result.adapter_bytes / 1e6:.2f}",
    "wall s": lambda result: f"{result.wall_s:.0f}",
}
PLAN_COLUMNS: dict[str, Callable[[PlanResult], str]] = {
    "trainable": lambda result: f"{result.trainable:,}",
    "total GiB": lambda result: f"{result.total_gib:.2f}",
    "base": lambda result: f"{result.base_gib:.2f}",
    "trained": lambda result: f"{result.adapter_gib + result.gradients_gib + result.optimizer_gib:.2f}",
    "activations": lambda result: f"{result.activations_gib:.2f}",
    "logits": lambda result: f"{result.head_gib:.2f}",
    "fits": lambda result: {True: "yes", False: "no", None: ""}[result.fits],
    "max batch": lambda result: "" if result.largest_batch is None else str(result.largest_batch),
    "max rank": lambda result: "" if result.largest_rank is None else str(result.largest_rank),
}

# What a narrow terminal leaves out, first to last; comparison.csv has it all.
_LEAST_NEEDED = (
    "wall s",
    "base MB",
    "adapter MB",
    "trainable",
    "logits",
    "trained",
    "base",
    "perplexity",
    "activations",
)
_SHORT = 20


@dataclass(frozen=True)
class JobReport:
    """One job's folder and outcome."""

    folder: Path
    outcome: Outcome


def report_sweep(folder: Path, interrupted: bool) -> bool:
    """Print the table, write it and the pictures beside the jobs, and end the sweep's parent run.

    Returns whether every job finished. There is no table when no job got as far as an outcome.
    """
    note_lost(folder)
    jobs = collect(folder)
    finished = all(job.outcome.status == "FINISHED" for job in jobs)
    status = "KILLED" if interrupted else "FINISHED" if finished and jobs else "FAILED"
    with tracking.ended_sweep(folder, status) as tracked:
        if jobs:
            _sum_up(folder, jobs, tracked)
    return finished and not interrupted if jobs else not interrupted


def _sum_up(folder: Path, jobs: list[JobReport], tracked: SweepRun | None) -> None:
    varying = differing(jobs)
    columns = result_columns(jobs)
    rows = [_row(job, varying, columns) for job in jobs]
    header = ["job", *varying, *columns, "status"]
    _print(header, rows, set(columns) - set(PLAN_COLUMNS))
    _write_csv(folder / "comparison.csv", header, rows)
    markdown = _markdown(header, rows)
    (folder / "comparison.md").write_text(markdown)
    pictures = draw(folder, jobs, varying)
    files = [folder / "comparison.csv", folder / "comparison.md", *pictures]
    if tracked is not None:
        tracked.describe(markdown, files)
        tracked.sum_up(_best_run(jobs), _params(jobs))


def collect(folder: Path) -> list[JobReport]:
    """Every job below ``folder`` that left an outcome, lowest loss (or memory) first, unfinished ones last."""
    outcomes = [(file.parent, read_outcome(file.parent)) for file in sorted(folder.rglob(RESULT_FILE))]
    jobs = [JobReport(place, outcome) for place, outcome in outcomes if outcome]
    return sorted(jobs, key=lambda job: (_objective(job), job.outcome.number))


def differing(jobs: list[JobReport]) -> list[str]:
    """The config values that are not the same in every job; ``scale`` only if nothing else explains it.

    A job without factors has no rank, which is no other rank.
    """
    jobs = [job for job in jobs if job.outcome.values] or jobs  # those that ended before theirs were known
    names = dict.fromkeys(name for job in jobs for name in job.outcome.values)
    having = {name: [job for job in jobs if name in job.outcome.values or name not in KNOBS] for name in names}
    varying = [name for name in names if len({_text(job.outcome.values.get(name)) for job in having[name]}) > 1]
    derived = {"scale"} if {"rank", "alpha", "scaling"} & set(varying) else set()
    return [name for name in varying if name not in derived] or ["rank"]


def result_columns(jobs: list[JobReport]) -> list[str]:
    """The columns that some job's result fills; those of any training if none has a result."""
    results = [_cells(job.outcome.result) for job in jobs if job.outcome.result]
    if not results:
        return list(RESULT_COLUMNS)
    names = dict.fromkeys(name for cells in results for name in cells)
    if metrics := [name for name in names if name not in RESULT_COLUMNS and name not in PLAN_COLUMNS]:
        others = [name for name in names if name not in metrics]
        names = dict.fromkeys([*others[:1], *metrics, *others[1:]])
    return [name for name in names if any(cells.get(name) for cells in results)]


def draw(folder: Path, jobs: list[JobReport], varying: list[str]) -> list[Path]:
    """Loss curves, and final loss against rank and against trainable parameters. Returns the files."""
    finished = [(job, job.outcome.result) for job in jobs if isinstance(job.outcome.result, Result)]
    if not finished:
        return []
    curves = {_title(job, varying): _curve(job) for job, _ in finished}
    loss_curves(curves, folder / "loss_curves.png")
    by_rank: dict[str, list[tuple[float, float]]] = defaultdict(list)
    by_size: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for job, result in finished:
        group = _title(job, [name for name in varying if name not in ("rank", "seed", "alpha")])
        by_size[group].append((result.trainable, result.eval_loss))
        if isinstance(rank := job.outcome.values.get("rank"), int):
            by_rank[group].append((rank, result.eval_loss))
    final_loss(by_size, "trainable parameters", folder / "loss_against_parameters.png")
    if by_rank:
        final_loss(by_rank, "rank", folder / "loss_against_rank.png")
    return sorted(folder.glob("loss_*.png"))


def _best_run(jobs: list[JobReport]) -> str | None:
    return jobs[0].outcome.result.run_id if jobs[0].outcome.result else None


def _params(jobs: list[JobReport]) -> dict[str, str]:
    """What all jobs share as it is, and of what differs every value, in the order of the jobs."""
    by_number = sorted(jobs, key=lambda job: job.outcome.number)
    names = dict.fromkeys(name for job in by_number for name in job.outcome.values)
    values = {name: dict.fromkeys(_text(job.outcome.values.get(name)) for job in by_number) for name in names}
    return {name: ", ".join(value for value in found if value) for name, found in values.items()}


def _row(job: JobReport, varying: list[str], columns: list[str]) -> list[str]:
    outcome, result = job.outcome, job.outcome.result
    settings = [str(outcome.number), *(_text(outcome.values.get(name)) for name in varying)]
    if result is None:
        reason = (outcome.error or "").strip().splitlines()
        short = " ".join(line.strip() for line in reason)[:160]
        return [*settings, *[""] * len(columns), f"{outcome.status}: {short}"]
    return [*settings, *(_cells(result).get(name, "") for name in columns), outcome.status]


def _cells(result: AnyResult) -> dict[str, str]:
    if isinstance(result, SyncResult):
        return {}
    if isinstance(result, UseResult):
        return {name: _figure(name, value) for name, value in result.figures.items()}
    if isinstance(result, PlanResult):
        return {name: show(result) for name, show in PLAN_COLUMNS.items()}
    found = {}
    if result.best_loss is not None and result.best_step != result.step:  # else its adapter is the one that is there
        found["best/loss"] = f"{result.best_loss:.4f} @{result.best_step}"
    found |= {f"test/{name}": shown(value) for name, value in result.test.items()}
    metrics = found | {name: shown(value) for name, value in result.metrics.items()}
    return {name: show(result) for name, show in RESULT_COLUMNS.items()} | metrics


def _figure(name: str, value: float) -> str:
    """Of a task on finished runs, which may be a loss as well as a difference near nothing."""
    if name == "loss":
        return f"{value:.4f}"
    return shown(value) if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"


def fitting(header: list[str], rows: list[list[str]], width: int) -> tuple[list[str], list[list[str]]]:
    """Without as many columns of sizes and times as a terminal of ``width`` has no room for."""
    wide = [max(len(line[index]) for line in (header, *rows)) for index in range(len(header) - 1)]
    wide.append(max(len(line[-1][:_SHORT]) for line in (header, *rows)))  # a reason for failing may wrap
    shown = list(range(len(header)))
    for name in _LEAST_NEEDED:
        if sum(3 + wide[index] for index in shown) < width:
            break
        shown = [index for index in shown if header[index] != name]
    return [header[index] for index in shown], [[row[index] for index in shown] for row in rows]


def _print(header: list[str], rows: list[list[str]], unbroken: set[str]) -> None:
    console = Console()
    console = Console(width=console.width if console.is_terminal else 140)
    header, rows = fitting(header, rows, console.width)
    table = Table(title="Sweep, best first", title_justify="left")
    for name in header:
        right = name not in ("status",)
        table.add_column(name, justify="right" if right else "left", no_wrap=name in unbroken)
    for row in rows:
        table.add_row(*row, style="red" if row[-1] != "FINISHED" else None)
    console.print(table, markup=False)


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *([cell.replace(",", "") for cell in row] for row in rows)])


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _title(job: JobReport, names: list[str]) -> str:
    return " ".join(f"{name}={_text(job.outcome.values.get(name))}" for name in names)


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _curve(job: JobReport) -> list[tuple[float, float]]:
    return [(record["step"], record["eval/loss"]) for record in read_metrics(job.folder) if "eval/loss" in record]


def _objective(job: JobReport) -> float:
    return job.outcome.result.objective if job.outcome.result else math.inf
