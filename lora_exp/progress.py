"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn

from lora_exp.job import shown

log = logging.getLogger(__name__)
_SECONDS_BETWEEN_LINES = 5.0
_bars, _is_taken = True, False
_Self = TypeVar("_Self", bound="_Shown")


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """Lines alone, for jobs that are open at once: a terminal shows one bar at a time."""
    global _bars
    before, _bars = _bars, False
    try:
        yield
    finally:
        _bars = before


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """For a display of a whole sweep: a terminal has room for one, so that its jobs show no bars meanwhile."""
    global _is_taken
    before, _is_taken = _is_taken, True
    try:
        yield
    finally:
        _is_taken = before


class _Shown:
    """A bar of such ``columns`` on a terminal; None elsewhere. A context manager holds it open."""

    def __init__(self, *columns: ProgressColumn) -> None:
        has_bar = _bars and not _is_taken and sys.stdout.isatty()
        self._bar = Progress(*columns, console=Console(), transient=True) if has_bar else None

    def __enter__(self: _Self) -> _Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()


class TrainingProgress(_Shown):
    """Shows metric records as they come."""

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self._seen: dict[str, float] = {}
        self._last_line = time.monotonic()
        self._first: tuple[int, float] | None = None  # the first step that was seen, and when
        super().__init__(_wide(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"), TimeRemainingColumn())
        self._task = self._bar.add_task("train", total=steps, shown="") if self._bar else None

    def show(self, record: Mapping[str, float]) -> None:
        """Take one record of the training loop."""
        self._seen.update({key: value for key, value in record.items() if isinstance(value, float)})
        step = int(record["step"])
        if "train/loss" in record:
            self._first = self._first or (step, time.monotonic())
        if "eval/loss" in record:
            text = f"step {step:>4}/{self._steps}  validation loss {record['eval/loss']:.4f}"
            self._line("  ".join([text, *_other_figures(record)]))
        elif self._bar is None and self._first and not _is_taken and self._is_long_since():
            self._line(f"step {step:>4}/{self._steps}  {self._figures()}{self._eta(step)}")
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, shown=self._figures())

    def _figures(self) -> str:
        if "train/loss" not in self._seen:
            return ""
        seen = self._seen
        speeds = {name[len("train/") : -len("_per_s")]: seen[name] for name in seen if name.endswith("_per_s")}
        speed = "  ".join(f"{value:,.0f} {unit}/s" for unit, value in speeds.items())
        return f"loss {seen['train/loss']:.4f}  lr {seen['train/lr']:.2e}  {speed}"

    def _eta(self, step: int) -> str:
        """By the steps of this process alone: an evaluation or a process before them says nothing."""
        first, began = self._first or (step, 0.0)
        if step <= first:
            return ""
        left = (time.monotonic() - began) / (step - first) * (self._steps - step)
        return f"  ETA {int(left) // 60}:{int(left) % 60:02d}"

    def _is_long_since(self) -> bool:
        return time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._bar:
            self._bar.console.print(text, highlight=False)
        else:
            log.info(text)


class Stages(_Shown):
    """Shows the stages of long work one after the other: a bar each on a terminal, a line elsewhere."""

    def __init__(self) -> None:
        super().__init__(TextColumn("{task.description}"), _wide(), TextColumn("{task.fields[shown]}"))

    @contextlib.contextmanager
    def stage(self, name: str, folder: Path | None = None, size: int = 0) -> Iterator[Callable[[float], object]]:
        """Gives what moves the bar to a share of 0 to 1. ``folder``: it grows to ``size`` bytes meanwhile, by which the
        bar moves too."""
        started = time.monotonic()
        if self._bar is None:
            log.info(f"{name} ...")
            yield lambda share: None
            return
        bar, task = self._bar, self._bar.add_task(name, total=None, shown="")
        shares = [0.0]

        def say(share: float) -> None:
            shares[0] = max(shares[0], min(share, 1.0))
            seconds = f"{time.monotonic() - started:.0f} s"
            bar.update(task, completed=shares[0], total=1.0 if shares[0] else None, shown=seconds)

        over = threading.Event()
        looking = threading.Thread(target=_follow_size, args=(folder, size, say, over), daemon=True)
        looking.start()
        try:
            yield say
        finally:
            over.set()
            looking.join()
            bar.remove_task(task)


def _follow_size(folder: Path | None, size: int, say: Callable[[float], object], over: threading.Event) -> None:
    while not over.wait(0.2):
        written = 0
        if folder is not None and size:
            with contextlib.suppress(OSError):  # a file that has just got its name
                written = sum(file.stat().st_size for file in folder.rglob("*"))
        say(min(written / size, 0.99) if size else 0.0)


def _other_figures(record: Mapping[str, float]) -> list[str]:
    """What an evaluation found beside the loss: a perplexity, an accuracy."""
    names = [name for name in record if name.startswith("eval/") and name != "eval/loss"]
    return [f"{name.removeprefix('eval/')} {shown(record[name])}" for name in names]


def _wide() -> BarColumn:
    return BarColumn(bar_width=30)


class Steps(_Shown):
    """A bar for work of a known number of steps; nothing where there is no terminal."""

    def __init__(self, title: str, total: int) -> None:
        super().__init__(TextColumn("{task.description}"), _wide(), MofNCompleteColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task(title, total=total) if self._bar else None

    def advance(self, steps: int = 1) -> None:
        """So many more are done."""
        if self._bar and self._task is not None:
            self._bar.advance(self._task, steps)
