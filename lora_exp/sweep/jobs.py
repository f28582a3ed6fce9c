"""A sweep's jobs as they ended, what differs between them, and which of it was swept."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_exp.job import RESULT_FILE, Outcome, read_outcome
from lora_exp.listed import KNOBS


@dataclass(frozen=True)
class JobReport:
    """One job's folder and outcome."""

    folder: Path
    outcome: Outcome

    def value(self, name: str) -> object:
        """What its config has under ``name``; None where it has nothing."""
        return self.outcome.values.get(name)

    @property
    def status(self) -> str:
        """How it ended, and whether an earlier job did so in its place."""
        return f"{self.outcome.status} (reused)" if self.outcome.reused_from else self.outcome.status

    @property
    def reason(self) -> str:
        """Why it did not finish, in one line; nothing if it did."""
        return " ".join(line.strip() for line in (self.outcome.error or "").strip().splitlines())


def collect(folder: Path) -> list[JobReport]:
    """Every job below ``folder`` that left an outcome, lowest loss (or memory) first, unfinished ones last."""
    outcomes = [(file.parent, read_outcome(file.parent)) for file in sorted(folder.rglob(RESULT_FILE))]
    jobs = [JobReport(place, outcome) for place, outcome in outcomes if outcome]
    return sorted(jobs, key=lambda job: (_objective(job), job.outcome.number))


def differing(jobs: list[JobReport], swept: Iterable[str] = ()) -> list[str]:
    """The config values that are not the same in every job; ``scale`` only if nothing else explains it.

    Of a sweep that did not come further than one value, what was ``swept``.

    A job without factors has no rank, which is no other rank.
    """
    jobs = [job for job in jobs if job.outcome.values] or jobs  # those that ended before theirs were known
    names = dict.fromkeys(name for job in jobs for name in job.outcome.values)
    having = {name: [job for job in jobs if name in job.outcome.values or name not in KNOBS] for name in names}
    varying = [name for name in names if len({text(job.value(name)) for job in having[name]}) > 1]
    if "suite_experiment" in varying:  # which stands for what its files say of the adapter
        varying = [name for name in varying if not name.startswith(("adapter.", "backend"))]
    derived = {"scale"} if {"rank", "alpha", "scaling"} & set(varying) else set()
    found = [name for name in varying if name not in derived]
    return found or [name for name in swept if name in names] or ["rank"]


def factors(jobs: list[JobReport], varying: list[str], swept: Iterable[str]) -> list[str]:
    """Of what varies, the values that were swept: not those that follow from another, as ``alpha=2r`` from the rank.

    ``swept``: the keys as they were typed. One that chooses a section's file (``train``) stands for what this file
    changes.
    """
    varying = [name for name in varying if len({text(job.value(name)) for job in jobs}) > 1]
    found: list[str] = []
    explained = True
    for key in swept:
        if key in varying:
            found.append(key)
        elif below := [name for name in varying if name.startswith(f"{key}.")]:
            found += list(_independent(jobs, below, found))
        else:
            explained = False
    rest = [] if found and explained else [name for name in varying if name not in found]
    return list(dict.fromkeys([*found, *_independent(jobs, rest, found)]))


def is_replicate(name: str) -> bool:
    """Whether jobs that differ in ``name`` alone are the same experiment, once more."""
    return name.rpartition(".")[2] in ("seed", "sample_seed")


def title(job: JobReport, names: Iterable[str]) -> str:
    """A job by what it has under ``names``, to four digits, leaving out what it has not."""
    values = ((name, job.value(name)) for name in names)
    told = ((name, f"{value:.4g}" if isinstance(value, float) else text(value)) for name, value in values)
    return " ".join(f"{name}={said}" for name, said in told if said)


def grouped(jobs: Iterable[JobReport], names: Iterable[str]) -> list[list[JobReport]]:
    """Those that have the same under all ``names``, in the order of their first."""
    names, groups = list(names), defaultdict[tuple[str, ...], list[JobReport]](list)
    for job in jobs:
        groups[tuple(text(job.value(name)) for name in names)].append(job)
    return list(groups.values())


def text(value: object) -> str:
    """A config value as a person reads it; nothing for None."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return ",".join(text(each) for each in value)
    return "" if value is None else str(value)


def _independent(jobs: list[JobReport], names: Iterable[str], given: Iterable[str]) -> Iterator[str]:
    taken = list(given)
    for name in names:
        if not any(_follows(jobs, name, other) for other in taken):
            taken.append(name)
            yield name


def _follows(jobs: list[JobReport], name: str, other: str) -> bool:
    """Whether ``other`` tells what ``name`` is."""
    pairs = {(text(job.value(other)), text(job.value(name))) for job in jobs if job.outcome.values}
    return len(pairs) == len({known for known, _ in pairs})


def _objective(job: JobReport) -> float:
    value = job.outcome.result.objective if job.outcome.result else math.inf
    return value if math.isfinite(value) else math.inf
