"""How far a sweep is, as its folder tells while it runs: what was launched, and what each job has left there so far.

It needs no MLflow, and does not matter in which process, or on which machine, the jobs run.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_exp.adapters.files.whole import write_text
from lora_exp.job import METRICS_FILE, RESULT_FILE, SWEPT_FILE, Outcome, job_folders, read_begun, read_outcome
from lora_exp.machine import stopping
from lora_exp.machine.claims import owner

WAITING, RUNNING, LOST = "waiting", "running", "lost"
_KINDS = ("done", "reused", "pruned", RUNNING, WAITING, "failed", "killed", LOST)
_FILE = "launched.json"
_TAIL_BYTES = 8192


@dataclass(frozen=True)
class Launched:
    """``jobs``: the overrides of each that was given to a launcher, by number. ``total``: how many there will be.
    ``at``: when the first was."""

    at: float
    total: int
    jobs: dict[int, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class JobState:
    """``status``: waiting, running, lost, or how it ended. ``step`` of ``steps``; ``loss``: the last validation's,
    after step ``evaluated``."""

    number: int
    overrides: tuple[str, ...]
    status: str = WAITING
    folder: Path | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    evaluated: int = 0
    outcome: Outcome | None = None

    @property
    def has_ended(self) -> bool:
        return self.outcome is not None

    @property
    def share(self) -> float:
        """How much of it is done, of 0 to 1."""
        return 1.0 if self.has_ended else min(self.step / self.steps, 1.0) if self.steps else 0.0

    @property
    def kind(self) -> str:
        """The status in a word, which says too whether its result is an earlier one's, or of a job that was cut."""
        if self.outcome is None or self.status != "FINISHED":
            return {"FAILED": "failed", "KILLED": "killed"}.get(self.status, self.status)
        if getattr(self.outcome, "reused_from", None):
            return "reused"
        return "pruned" if getattr(self.outcome.result, "pruned_at", None) else "done"


@dataclass(frozen=True)
class SweepState:
    """``jobs`` by number. ``is_live``: whether the process that launched them is there. ``elapsed_s`` since then.
    ``is_stopping``: whether it was asked to stop."""

    jobs: list[JobState]
    total: int
    is_live: bool
    elapsed_s: float
    is_stopping: bool = False

    @property
    def running(self) -> list[JobState]:
        return [job for job in self.jobs if job.status == RUNNING]

    @property
    def ended(self) -> list[JobState]:
        return [job for job in self.jobs if job.has_ended]

    @property
    def counts(self) -> dict[str, int]:
        """How many jobs there are of a kind; those that were not given to a launcher yet are waiting too."""
        found = Counter(job.kind for job in self.jobs)
        found[WAITING] += self.total - len(self.jobs)
        return {kind: found[kind] for kind in _KINDS if found[kind]}

    def title(self, job: JobState) -> str:
        """A job by its number and by what not all of them were told."""
        common = set.intersection(*(set(each.overrides) for each in self.jobs)) if len(self.jobs) > 1 else set()
        return " ".join([f"job {job.number}", *(given for given in job.overrides if given not in common)])

    @property
    def best(self) -> JobState | None:
        """Of those that finished, the one with the lowest objective; None where nothing can be compared."""
        found = [job for job in self.jobs if _objective(job) < math.inf]
        return min(found, key=_objective) if found else None

    @property
    def left_s(self) -> float | None:
        """How long it will still take at the pace so far, whatever part of it ran at once; None before there is one.

        What was only found, or failed, says nothing of the pace.
        """
        done = sum(job.share for job in self.jobs if job.kind in ("done", "pruned", RUNNING))
        left = self.total - len(self.ended) - sum(job.share for job in self.running)
        return self.elapsed_s * left / done if done else None


def note_launched(folder: Path, overrides: Sequence[Sequence[str]], first: int, total: int | None) -> None:
    """Write down that a launcher of the sweep in ``folder`` was given such jobs, numbered from ``first`` on."""
    known = (read_launched(folder) if first else None) or Launched(time.time(), 0)
    jobs = known.jobs | {first + place: list(given) for place, given in enumerate(overrides)}
    with contextlib.suppress(OSError):
        write_text(folder / _FILE, json.dumps(asdict(replace(known, jobs=jobs, total=max(total or 0, len(jobs))))))


def read_launched(folder: Path) -> Launched | None:
    """What was launched of the sweep in ``folder``; None if no launcher of ours was."""
    try:
        raw = json.loads((folder / _FILE).read_text())
        return Launched(raw["at"], raw["total"], {int(number): given for number, given in raw["jobs"].items()})
    except (OSError, ValueError, KeyError):
        return None


def is_sweep(folder: Path) -> bool:
    """Whether a sweep was begun in ``folder``."""
    return any((folder / name).is_file() for name in (_FILE, SWEPT_FILE))


def begun_last(root: Path) -> Path | None:
    """The folder below ``root`` in which a sweep was begun last."""
    found = {file.parent: file.stat().st_mtime for name in (_FILE, SWEPT_FILE) for file in root.glob(f"**/{name}")}
    return max(found, key=lambda folder: found[folder]) if found else None


class Looking:
    """Reads the folder of a sweep again and again; what has ended is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ended: dict[Path, tuple[float, JobState]] = {}

    def state(self) -> SweepState:
        """As it is now."""
        launched = read_launched(self._folder)
        found = {job.number: job for place in job_folders(self._folder) if (job := self._job(place))}
        waiting = launched.jobs if launched else {}
        jobs = {number: JobState(number, tuple(given)) for number, given in waiting.items()} | found
        process = owner(self._folder)
        is_live = process is not None and not process.is_gone()
        total = max(launched.total if launched else 0, len(jobs))
        listed, elapsed = [jobs[number] for number in sorted(jobs)], self._elapsed(launched, is_live)
        return SweepState(listed, total, is_live, elapsed, is_live and stopping.is_asked(self._folder))

    def _job(self, place: Path) -> JobState | None:
        with contextlib.suppress(OSError):
            changed = (place / RESULT_FILE).stat().st_mtime
            known = self._ended.get(place)
            if known is None or known[0] != changed:
                self._ended[place] = (changed, _ended(place))
            return self._ended[place][1]
        return _running(place)

    def _elapsed(self, launched: Launched | None, is_live: bool) -> float:
        if launched is None:
            return 0.0
        last = max((changed for changed, _ in self._ended.values()), default=launched.at)
        return max((time.time() if is_live else last) - launched.at, 0.0)


def _ended(place: Path) -> JobState:
    outcome = read_outcome(place)
    assert outcome is not None
    told = JobState(outcome.number, tuple(outcome.overrides), outcome.status, place, outcome=outcome)
    return replace(told, **_last(place))


def _running(place: Path) -> JobState | None:
    begun = read_begun(place)
    if begun is None:
        return None
    process = owner(place)
    status = LOST if process is not None and process.is_gone() else RUNNING
    return replace(JobState(begun.number, tuple(begun.overrides), status, place, steps=begun.steps), **_last(place))


def _last(place: Path) -> dict[str, Any]:
    """The last step that a job has told of, and its last validation loss, if its last lines have one."""
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError), (place / METRICS_FILE).open("rb") as stream:
        stream.seek(0, 2)
        stream.seek(max(stream.tell() - _TAIL_BYTES, 0))
        for line in stream.read().decode(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                record = json.loads(line)
                found["step"] = int(record["step"])
                if "eval/loss" in record:
                    found |= {"loss": float(record["eval/loss"]), "evaluated": found["step"]}
    return found


def _objective(job: JobState) -> float:
    result = job.outcome.result if job.outcome and job.outcome.status == "FINISHED" else None
    return result.objective if result and math.isfinite(result.objective) else math.inf
