"""What is still to be told to MLflow about one run: a journal on disk, so that no end of the process loses it.

Each line is one thing to tell, in the order in which it happened. How far it was delivered stands in a second file,
which is replaced whole. Both are in the job's folder, below ``tracking/``, and are gone once all is delivered:
what is still there is what MLflow lacks. Numbers are kept with their time, so that a later delivery tells the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lora_exp.adapters.files.whole import write_text

FOLDER = "tracking"
_SUFFIX = ".jsonl"
_MOST_POINTS = 1000  # what MLflow takes in one call
Entry = dict[str, Any]


class InDeliveryError(Exception):
    """Another process delivers this journal."""


@dataclass(frozen=True)
class Batch:
    """Lines that go out together. ``end``: where the next one begins."""

    entries: list[Entry]
    start: int
    end: int

    @property
    def is_empty(self) -> bool:
        return self.start == self.end


class Outbox:
    """The journal of the run ``run_id`` in ``folder``, this process's alone until it is closed.

    ``address`` is where the run lives: ``uri`` (None: taken from the environment, as it may hold a login), ``where``
    (for people). ``was_there``: an earlier process has written to it, and may have delivered more than it noted.
    """

    def __init__(self, folder: Path, run_id: str, address: dict[str, str | None] | None = None) -> None:
        self.folder, self.run_id = folder, run_id
        place = folder / FOLDER
        place.mkdir(parents=True, exist_ok=True)
        self._journal, self._notes = place / f"{run_id}{_SUFFIX}", place / f"{run_id}.json"
        self._lock = FileLock(place / f".{run_id}.lock")
        with contextlib.suppress(NotImplementedError, OSError):  # a file system without locks
            try:
                self._lock.acquire(timeout=0)
            except Timeout:
                raise InDeliveryError(str(self._journal)) from None
        self.was_there = self._journal.exists()
        self.address: dict[str, str | None] = address or {}
        self._is_closed, self._delivered = False, 0
        self.postponed: list[Entry] = []
        if self.was_there:
            self._read_notes()
        self._writing = threading.Lock()
        self._out = os.open(self._journal, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        self._end_half_a_line()
        self._note()

    def append(self, entry: Entry) -> None:
        """Raises OSError where the disk takes no more."""
        line = (json.dumps(entry) + "\n").encode()
        with self._writing:
            if os.write(self._out, line) < len(line):
                os.ftruncate(self._out, self._size() - self._size_of_half())
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._journal))

    def next(self) -> Batch:
        """What is to be delivered next: numbers as many as go into one call, or one thing of another kind."""
        entries: list[Entry] = []
        end, points = self._delivered, 0
        for entry, after in self._lines(self._delivered):
            points += len(entry.get("metrics", ()))
            if entries and ("metrics" not in entry or points > _MOST_POINTS):
                break
            entries.append(entry)
            end = after
            if "metrics" not in entry:
                break
        return Batch([entry for entry in entries if entry], self._delivered, end)

    def acknowledge(self, batch: Batch) -> None:
        """Everything up to the end of ``batch`` is delivered."""
        self._delivered = batch.end
        self._note_if_possible()

    def postpone(self, batch: Batch) -> None:
        """Let what comes after ``batch`` go first: a file that is not taken must not keep back the numbers."""
        self.postponed += batch.entries
        self.acknowledge(batch)

    def settle(self, entry: Entry) -> None:
        """A postponed entry is delivered."""
        self.postponed.remove(entry)
        self._note_if_possible()

    def left(self) -> int:
        """How many lines are not delivered yet."""
        return len(self.postponed) + sum(bool(entry) for entry, _ in self._lines(self._delivered))

    def close(self) -> None:
        """Give it back. It is removed if nothing is left in it."""
        self._is_closed = True
        is_done = self._delivered >= self._size() and not self.postponed
        os.close(self._out)
        if is_done:
            for file in (self._journal, self._notes):
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self._lock.release()
            Path(self._lock.lock_file).unlink(missing_ok=True)
            self._journal.parent.rmdir()  # if this was the last one

    def _size(self) -> int:
        return os.fstat(self._out).st_size

    def _size_of_half(self) -> int:
        rest = self._journal.read_bytes()
        return len(rest) - (rest.rfind(b"\n") + 1)

    def _end_half_a_line(self) -> None:
        """What a process that was killed while it wrote has left; such a line is skipped."""
        if self._size() and self._size_of_half():
            os.write(self._out, b"\n")

    def _lines(self, start: int) -> Iterator[tuple[Entry, int]]:
        """Whole lines from ``start`` on, each with where it ends; an empty one for a line that cannot be read."""
        with self._journal.open("rb") as stream:
            stream.seek(start)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                start += len(line)
                try:
                    yield json.loads(line), start
                except ValueError:
                    yield {}, start

    def _read_notes(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            notes = json.loads(self._notes.read_text())
            self.address = self.address or notes["address"]
            self._delivered = min(int(notes["delivered"]), self._journal.stat().st_size)
            self.postponed = list(notes["postponed"])

    def _note_if_possible(self) -> None:
        """On a full disk it is not; a later delivery compares with what MLflow has. What is closed is another's."""
        if not self._is_closed:
            with contextlib.suppress(OSError):
                self._note()

    def _note(self) -> None:
        notes = {
            "run_id": self.run_id,
            "address": self.address,
            "delivered": self._delivered,
            "postponed": self.postponed,
        }
        write_text(self._notes, json.dumps(notes, indent=2) + "\n")


def outboxes(folder: Path) -> list[tuple[Path, str]]:
    """Folder and run of every journal below ``folder``; a sweep's own behind those of its jobs."""
    found = [(file.parents[1], file.stem) for file in folder.rglob(f"{FOLDER}/*{_SUFFIX}")]
    return sorted(found, key=lambda place: (-len(place[0].parts), str(place[0])))
