"""Norms of gradients by what was swept, in Markdown: ``python -m benchmarks.gradient_norms FOLDER`` (a sweep's).

Of each job: that of its first optimizer step, and the mean over all of them, before clipping. At the first step B is
zero and nothing has been learnt, so that arms differ there by rank and scaling alone.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from lora_exp.job import read_metrics
from lora_exp.sweep.jobs import JobReport, collect, differing, grouped, is_replicate, title
from lora_exp.sweep.verdict.arms import validation_of

KEY = "train/grad_norm"


def norms(job: JobReport) -> list[float]:
    """In the order of the steps."""
    return [record[KEY] for record in read_metrics(job.folder) if KEY in record]


def told(folder: Path) -> str:
    """A row for each combination of swept values, its seeds taken together. Raises SystemExit without jobs."""
    jobs = [job for job in collect(folder) if job.outcome.status == "FINISHED" and norms(job)]
    if not jobs:
        raise SystemExit(f"{folder} has no finished job with {KEY}")
    names = [name for name in differing(jobs) if not is_replicate(name)]
    rows = ["| | seeds | first step | mean of all steps | loss |", "| --- | ---: | ---: | ---: | ---: |"]
    for group in grouped(sorted(jobs, key=lambda job: job.outcome.number), names):
        found = [norms(job) for job in group]
        first, mean = statistics.mean(each[0] for each in found), statistics.mean(map(statistics.mean, found))
        loss = statistics.mean(validation_of(job, "loss") for job in group)
        rows.append(f"| {title(group[0], names)} | {len(group)} | {first:.3g} | {mean:.3g} | {loss:.4f} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(told(Path(sys.argv[1])))
