"""The comparison of a sweep's jobs: what differs between them, and what came of it, best first."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_exp import tracking
from lora_exp.job import RESULT_FILE, Outcome, PlanResult, Result, read_metrics, read_outcome
from lora_exp.plots import final_loss, loss_curves


@dataclass(frozen=True)
class JobReport:
    """One job's folder and outcome."""

    folder: Path
    outcome: Outcome


def report_sweep(folder: Path, interrupted: bool) -> bool:
    """Print the table, write it and the pictures beside the jobs, and end the sweep's parent run.

    Returns whether every job finished. Does nothing when no job got as far as an outcome.
    """
    jobs = collect(folder)
    if not jobs:
        return not interrupted
    varying = differing(jobs)
    results = [_cells(job.outcome.result) for job in jobs]
    columns = list(dict.fromkeys(name for cells in results for name in cells))
    rows = [
        [*_settings(job, varying), *(cells.get(name, "") for name in columns), _end(job)]
        for job, cells in zip(jobs, results, strict=True)
    ]
    header = ["job", *varying, *columns, "status"]
    _print(header, rows, columns)
    _write_csv(folder / "comparison.csv", header, rows)
    markdown = _markdown(header, rows)
    (folder / "comparison.md").write_text(markdown)
    pictures = draw(folder, jobs, varying)
    finished = all(job.outcome.status == "FINISHED" for job in jobs)
    status = "KILLED" if interrupted else "FINISHED" if finished else "FAILED"
    files = [folder / "comparison.csv", folder / "comparison.md", *pictures]
    tracking.close_sweep(folder, status, markdown, files)
    return finished and not interrupted


def collect(folder: Path) -> list[JobReport]:
    """Every job below ``folder`` that left an outcome, lowest loss (or memory) first, unfinished ones last."""
    outcomes = [(file.parent, read_outcome(file.parent)) for file in sorted(folder.rglob(RESULT_FILE))]
    jobs = [JobReport(place, outcome) for place, outcome in outcomes if outcome]
    return sorted(jobs, key=lambda job: (_objective(job), job.outcome.number))


def differing(jobs: list[JobReport]) -> list[str]:
    """The config values that are not the same in every job; ``scale`` only if nothing else explains it."""
    names = dict.fromkeys(name for job in jobs for name in job.outcome.values)
    varying = [name for name in names if len({_text(job.outcome.values.get(name)) for job in jobs}) > 1]
    derived = {"scale"} if {"rank", "alpha", "scaling"} & set(varying) else set()
    return [name for name in varying if name not in derived] or ["rank"]


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
        if "rank" in job.outcome.values:
            by_rank[group].append((job.outcome.values["rank"], result.eval_loss))
    final_loss(by_size, "trainable parameters", folder / "loss_against_parameters.png")
    if by_rank:
        final_loss(by_rank, "rank", folder / "loss_against_rank.png")
    return sorted(folder.glob("loss_*.png"))


def _settings(job: JobReport, varying: list[str]) -> list[str]:
    return [str(job.outcome.number), *(_text(job.outcome.values.get(name)) for name in varying)]


def _end(job: JobReport) -> str:
    if job.outcome.result is not None:
        return job.outcome.status
    lines = (job.outcome.error or "").strip().splitlines()
    return f"{job.outcome.status}: {' '.join(line.strip() for line in lines)[:160]}"


def _cells(result: Result | PlanResult | None) -> dict[str, str]:
    """A result's columns by name."""
    if isinstance(result, PlanResult):
        return _plan_cells(result)
    if result is None:
        return {}
    return {
        "eval/loss": f"{result.eval_loss:.4f}",
        "perplexity": f"{result.eval_perplexity:.2f}",
        "trainable": f"{result.trainable:,}",
        "adapter MB": f"{result.adapter_bytes / 1e6:.2f}",
        "wall s": f"{result.wall_s:.0f}",
    }


def _plan_cells(result: PlanResult) -> dict[str, str]:
    sizes = {
        "total GiB": result.total_gib,
        "base": result.base_gib,
        "trained": result.adapter_gib + result.gradients_gib + result.optimizer_gib,
        "activations": result.activations_gib,
        "logits": result.head_gib,
    }
    cells = {"trainable": f"{result.trainable:,}", **{name: f"{size:.2f}" for name, size in sizes.items()}}
    if result.fits is not None:
        cells |= {"fits": "yes" if result.fits else "no", "max batch": str(result.largest_batch)}
        cells |= {"max rank": "" if result.largest_rank is None else str(result.largest_rank)}
    return cells


def _print(header: list[str], rows: list[list[str]], columns: list[str]) -> None:
    table = Table(title="Sweep, best first", title_justify="left")
    for name in header:
        table.add_column(name, justify="left" if name == "status" else "right", no_wrap=name in columns)
    for row in rows:
        table.add_row(*row, style="red" if row[-1] != "FINISHED" else None)
    console = Console()
    Console(width=None if console.is_terminal else 140).print(table, markup=False)


def _write_csv(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([header, *([cell.replace(",", "") for cell in row] for row in rows)])


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    escaped = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _title(job: JobReport, names: list[str]) -> str:
    return " ".join(f"{name}={_text(job.outcome.values.get(name))}" for name in names)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return "" if value is None else str(value)


def _curve(job: JobReport) -> list[tuple[float, float]]:
    return [(record["step"], record["eval/loss"]) for record in read_metrics(job.folder) if "eval/loss" in record]


def _objective(job: JobReport) -> float:
    return job.outcome.result.objective if job.outcome.result else math.inf
