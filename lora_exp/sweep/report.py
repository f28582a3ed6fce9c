"""The end of a sweep: its table, its pictures and its report, beside the jobs and in its parent run."""

from __future__ import annotations

from pathlib import Path

from lora_exp.job import read_study, read_swept
from lora_exp.sweep.figures import Figure, against_cost, against_factors, curves
from lora_exp.sweep.jobs import JobReport, collect, differing, factors, text
from lora_exp.sweep.lost import note_lost
from lora_exp.sweep.parallel import Parallel, parallel_of
from lora_exp.sweep.quantities import costs_of, results_of
from lora_exp.sweep.table import Table, markdown, table_of, write_csv
from lora_exp.sweep.terminal import show
from lora_exp.sweep.verdict import telling
from lora_exp.sweep.verdict.verdict import Verdict, verdict_of
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.sweeps import SweepRun

PAGE_FILE = "report.html"


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


def figures_of(jobs: list[JobReport], names: list[str]) -> tuple[list[Figure], list[Parallel]]:
    """Everything that there is to draw: curves, results against what was swept (``names``) and against what it cost."""
    results, costs = results_of(jobs), costs_of(jobs)
    found = [curves(jobs, names, result) for result in results]
    for result in results:
        found += against_factors(jobs, names, result)
        found += [against_cost(jobs, names, result, cost) for cost in costs]
    parallels = [parallel_of(jobs, names, result) for result in results]
    return [each for each in found if each], [each for each in parallels if each]


def _sum_up(folder: Path, jobs: list[JobReport], tracked: SweepRun | None) -> None:
    """What is drawn comes last: what hinders it costs nobody the table."""
    swept = read_swept(folder)
    varying = differing(jobs, swept)
    table, names = table_of(jobs, varying), factors(jobs, varying, swept)
    verdict = verdict_of(jobs, names, read_study(folder))
    if verdict is not None:
        telling.show(verdict)
    show(table)
    files = [folder / "comparison.csv", folder / "comparison.md"]
    write_csv(table, files[0])
    files[1].write_text(markdown(table))
    if verdict is not None:
        files += telling.write(verdict, folder)
    if tracked is not None:
        told = telling.markdown(verdict) if verdict is not None else ""
        tracked.describe(told + files[1].read_text(), files)
        tracked.sum_up(_best_run(jobs), _params(jobs))
    drawn = _draw(folder, jobs, table, names, verdict)
    if tracked is not None:
        tracked.add(drawn)


def _draw(folder: Path, jobs: list[JobReport], table: Table, names: list[str], verdict: Verdict | None) -> list[Path]:
    """The pictures and the page. Returns the files."""
    from lora_exp.sweep import page, pictures  # import matplotlib and plotly

    figures, parallels = figures_of(jobs, names)
    files = []
    for figure in figures:
        pictures.draw(figure, folder / f"{figure.name}.png")
        files.append(folder / f"{figure.name}.png")
    for parallel in parallels:
        pictures.draw_parallel(parallel, folder / f"{parallel.name}.png")
        files.append(folder / f"{parallel.name}.png")
    over = f" over {', '.join(names)}" if names else ""
    above = telling.section(verdict) if verdict is not None else ""
    page.write_page(folder / PAGE_FILE, f"Sweep{over}", jobs, table, figures, parallels, above)
    return [folder / PAGE_FILE, *files]


def _best_run(jobs: list[JobReport]) -> str | None:
    return jobs[0].outcome.result.run_id if jobs[0].outcome.result else None


def _params(jobs: list[JobReport]) -> dict[str, str]:
    """What all jobs share as it is, and of what differs every value, in the order of the jobs."""
    by_number = sorted(jobs, key=lambda job: job.outcome.number)
    names = dict.fromkeys(name for job in by_number for name in job.outcome.values)
    values = {name: dict.fromkeys(text(job.value(name)) for job in by_number) for name in names}
    return {name: ", ".join(value for value in found if value) for name, found in values.items()}
