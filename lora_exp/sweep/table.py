"""The table of a sweep's jobs: what differs between them and what came of it, as rows of text."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_exp.job import AnyResult, PlanResult, Result, SyncResult, UseResult, shown
from lora_exp.sweep.jobs import JobReport, text

# Each with how a result shows it, the one that jobs are sorted by first; metrics come behind it. A column that is
# empty for every job is left out.
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
SORTED_BY = ("eval/loss", "total GiB")
_REASON = 160  # characters


@dataclass(frozen=True)
class Table:
    """``header`` names the columns of ``rows``: the job's number, what ``varying``, the ``results``, the status."""

    varying: list[str]
    results: list[str]
    rows: list[list[str]]

    @property
    def header(self) -> list[str]:
        return ["job", *self.varying, *self.results, "status"]

    @property
    def needed(self) -> list[str]:
        """The columns without which nobody knows what was compared, and how it ended."""
        return ["job", *self.varying, *(name for name in SORTED_BY if name in self.results), "status"]


def table_of(jobs: list[JobReport], varying: list[str]) -> Table:
    """A row a job, in their order."""
    columns = result_columns(jobs)
    return Table(varying, columns, [_row(job, varying, columns) for job in jobs])


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


def write_csv(table: Table, path: Path) -> None:
    """All of it, numbers without separators."""
    columns = [name in table.results for name in table.header]
    rows = [[cell.replace(",", "") if is_figure else cell for cell, is_figure in zip(row, columns, strict=True)]
            for row in table.rows]  # fmt: skip
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([table.header, *rows])


def markdown(table: Table) -> str:
    """All of it, as MLflow shows it."""
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in table.rows]
    lines = [table.header, ["---"] * len(table.header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _row(job: JobReport, varying: list[str], columns: list[str]) -> list[str]:
    outcome, result = job.outcome, job.outcome.result
    settings = [str(outcome.number), *(text(job.value(name)) for name in varying)]
    cells = _cells(result) if result else {}
    status = f"{job.status}: {job.reason[:_REASON]}" if job.reason else job.status
    if isinstance(result, Result) and result.pruned_at is not None:
        status += f", pruned at {result.pruned_at}"
    return [*settings, *(cells.get(name, "") for name in columns), status]


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
    found |= {f"test/{name}": _metric(name, value) for name, value in result.test.items()}
    metrics = found | {name: _metric(name, value) for name, value in result.metrics.items()}
    return {name: show(result) for name, show in RESULT_COLUMNS.items()} | metrics


def _metric(name: str, value: float) -> str:
    """Each loss as exactly as the validation loss."""
    return f"{value:.4f}" if "loss" in name else shown(value)


def _figure(name: str, value: float) -> str:
    """Of a task on finished runs, which may be a loss as well as a difference near nothing."""
    if name == "loss":
        return f"{value:.4f}"
    return shown(value) if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
