"""One display for a whole sweep: how many jobs are done, what runs, when it will be over, and the best so far.

On a terminal it is live, below what is said meanwhile. Elsewhere there are only lines of what happens, each with the
number of its job.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from lora_exp import progress
from lora_exp.job import Result
from lora_exp.sweep.state import LOST, RUNNING, JobState, Looking, SweepState, note_launched

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5
_MOST_ROWS = 8
STOPPING = "stops: what runs keeps a checkpoint; once more ends it at once"
Say = Callable[[str], object]


@contextlib.contextmanager
def launched(
    folder: Path, overrides: Sequence[Sequence[str]], first: int, total: int | None, tells_jobs: bool
) -> Iterator[None]:
    """For a launcher, around the block in which it runs such jobs of the sweep in ``folder``: ``first`` is the first's
    number."""
    note_launched(folder, overrides, first, total)
    with shown(folder, tells_jobs):
        yield


@contextlib.contextmanager
def shown(folder: Path, tells_jobs: bool) -> Iterator[None]:
    """Show the sweep in ``folder`` while the block runs. ``tells_jobs``: say what its jobs do, as those in other
    processes do not say it here."""
    if not sys.stdout.isatty():
        with _looked_at(folder, _Telling(log.info) if tells_jobs else None):
            yield
        return
    now = display(Looking(folder).state())
    with Live(now, console=Console(), transient=True, auto_refresh=False) as live, progress.taken():
        telling = _Telling(lambda said: live.console.print(said, highlight=False)) if tells_jobs else None
        with _looked_at(folder, telling, live):
            yield


def follow(folder: Path, look_again: Callable[[], bool]) -> SweepState:
    """Show the sweep in ``folder`` until it ends; ``look_again`` waits a little and says whether to go on."""
    looking = Looking(folder)
    state = looking.state()
    if not sys.stdout.isatty():
        return state
    with Live(display(state), console=Console(), transient=True, auto_refresh=False) as live:
        while state.is_live and look_again():
            state = looking.state()
            live.update(display(state), refresh=True)
    return state


def display(state: SweepState) -> Group:
    """What is shown on a terminal: the sweep, and a line for each job that runs."""
    bar = ProgressBar(total=max(state.total, 1), completed=sum(job.share for job in state.jobs), width=20)
    head = Table.grid(padding=(0, 1))
    head.add_column(no_wrap=True)
    head.add_row(bar, Text(heading(state), no_wrap=True, overflow="ellipsis"))
    rows = Table.grid(padding=(0, 1))
    for _ in range(3):
        rows.add_column(no_wrap=True, overflow="ellipsis")
    for job in state.running[:_MOST_ROWS]:
        bar = ProgressBar(total=1.0, completed=job.share, width=10)
        rows.add_row(bar, Text(figures(job)), Text(state.title(job)))
    best = [Text(said, no_wrap=True, overflow="ellipsis")] if (said := best_so_far(state)) else []
    rest = len(state.running) - _MOST_ROWS
    return Group(head, *best, rows, *([Text(f"and {rest} more")] if rest > 0 else []))


def lines(state: SweepState) -> list[str]:
    """All of it where there is no terminal to show it on: the sweep, what runs, and why the others did not finish."""
    running = [f"{state.title(job)}  {figures(job)}" for job in state.running]
    unfinished = [f"{state.title(job)}  {_end(job)}" for job in state.ended if job.status != "FINISHED"]
    lost = [f"{state.title(job)}  lost: its process is gone" for job in state.jobs if job.status == LOST]
    return [line for line in (heading(state), best_so_far(state), *running, *unfinished, *lost) if line]


def heading(state: SweepState) -> str:
    """The sweep in a line."""
    counts = ", ".join(f"{count} {kind}" for kind, count in state.counts.items())
    left = f"ETA {_clock(state.left_s)}" if state.is_live and state.left_s else ""
    stops = STOPPING if state.is_stopping else ""
    return "  ".join(part for part in (f"{len(state.ended)}/{state.total} jobs", counts, stops or left) if part)


def best_so_far(state: SweepState) -> str:
    """The job with the lowest objective, if one has any."""
    best = state.best
    if best is None or best.outcome is None or best.outcome.result is None:
        return ""
    return f"best so far  {best.outcome.result.objective:.4f}  {state.title(best)}"


def figures(job: JobState) -> str:
    """How far a job is."""
    steps = f"step {job.step:>4}/{job.steps}" if job.steps else "begins"
    return steps if job.loss is None else f"{steps}  validation loss {job.loss:.4f}"


class _Telling:
    """Says of each job that it begins, what it finds, and how it ends: once each."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._said: dict[int, object] = {}
        self._is_stopping = False

    def tell(self, state: SweepState) -> None:
        """Say what is new."""
        if state.is_stopping and not self._is_stopping:
            self._is_stopping = True
            self._say(f"The sweep {STOPPING}")
        for job in state.jobs:
            before = self._said.get(job.number)
            if job.has_ended and before != job.status:
                self._said[job.number] = job.status
                self._say(f"{state.title(job)}  {_end(job)}")
            elif job.status == RUNNING and before is None:
                self._said[job.number] = -1
                self._say(f"{state.title(job)}  has begun")
            elif job.status == RUNNING and job.loss is not None and before != job.evaluated:
                self._said[job.number] = job.evaluated
                of = f"/{job.steps}" if job.steps else ""  # not known yet of a job that is reused
                self._say(f"job {job.number}  step {job.evaluated:>4}{of}  validation loss {job.loss:.4f}")


@contextlib.contextmanager
def _looked_at(folder: Path, telling: _Telling | None, live: Live | None = None) -> Iterator[None]:
    looking, over = Looking(folder), threading.Event()

    def look() -> None:
        with contextlib.suppress(OSError, ValueError, LookupError):  # a file that nobody can read is no end of a sweep
            state = looking.state()
            if live:
                live.update(display(state), refresh=True)
            if telling:
                telling.tell(state)

    def look_again() -> None:
        while not over.wait(_LOOK_EVERY_S):
            look()

    if telling is None and live is None:
        yield
        return
    thread = threading.Thread(target=look_again, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


def _end(job: JobState) -> str:
    outcome = job.outcome
    if outcome is None or outcome.result is None:
        lines = (outcome.error or "").strip().splitlines() if outcome else []
        return f"{job.status}: {lines[0]}" if lines else job.status
    if isinstance(outcome.result, Result):
        return f"{job.kind}  validation loss {outcome.result.eval_loss:.4f}, {outcome.result.wall_s:.0f} s"
    return job.kind


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
