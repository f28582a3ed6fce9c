"""Delivers an outbox in the background: whoever trains only writes a line and goes on, whatever the server does."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence

from lora_exp.machine import signals
from lora_exp.tracking.client import reason
from lora_exp.tracking.outbox import Batch, Entry, Outbox
from lora_exp.tracking.telling import GoneError

log = logging.getLogger(__name__)
Tell = Callable[[Sequence[Entry]], None]
_PAUSES_S = (0.2, 0.5, 1.0, 2.0, 4.0)  # between tries; the last one from then on
_TURN_S = 0.05
_AFTER_SIGNAL_S = 3.0


class Delivery:
    """One thread that tells what stands in ``outbox``. ``where`` names the server for people.

    What comes within a second (MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS) goes out together: SQLite has one writer.
    """

    def __init__(self, outbox: Outbox, tell: Tell, where: str) -> None:
        self._outbox, self._tell, self._where = outbox, tell, where
        self._gather_s = float(os.environ.get("MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS") or 1)
        self._news, self._closing, self._over = threading.Event(), threading.Event(), threading.Event()
        self._tries = {"lines": 0, "files": 0}  # that failed, one after the other
        self._last_success = time.monotonic()
        self._sends_file = False
        self._turn = threading.Lock()
        self.trouble = ""
        self._thread = threading.Thread(target=self._deliver_on, name="tracking", daemon=True)
        self._thread.start()

    @property
    def is_failing(self) -> bool:
        """Whether the last try failed."""
        return bool(self._tries["lines"])

    @contextlib.contextmanager
    def held_back(self) -> Iterator[None]:
        """Tell nothing during a block, as far as what is on its way ends within two seconds."""
        has_turn = self._turn.acquire(timeout=2)
        try:
            yield
        finally:
            if has_turn:
                self._turn.release()

    def wake(self) -> None:
        """There is a new line."""
        self._news.set()

    def drain(self, patience_s: float, at_most_s: float = math.inf) -> bool:
        """Wait until all is delivered, or until nothing went on for ``patience_s``. Returns whether all is.

        A file on its way is waited for: a server that is silent ends that by itself. A signal shortens the wait.
        """
        self._closing.set()
        self._news.set()
        began = time.monotonic()
        while self._thread.is_alive() and time.monotonic() - began < at_most_s:
            still_s = time.monotonic() - max(began, self._last_success)
            patience_s = min(patience_s, _AFTER_SIGNAL_S) if signals.received() is not None else patience_s
            if still_s > patience_s and not (self._sends_file and not self._tries["files"]):
                break
            self._thread.join(_TURN_S)
        self._over.set()
        self._thread.join(_TURN_S)
        return not self._outbox.left()

    def _deliver_on(self) -> None:
        try:
            while not self._over.is_set():
                batch = self._outbox.next()
                if not batch.is_empty:
                    self._deliver(batch)
                elif self._outbox.postponed:
                    self._deliver_postponed(self._outbox.postponed[0])
                elif self._closing.is_set():
                    return
                else:
                    self._wait_for_news()
        except GoneError as error:
            self.trouble = str(error)
            log.warning("MLflow at %s takes no more of this run (%s)", self._where, error)
        except Exception as error:  # a bug, or a journal that cannot be read: said, and training goes on
            self.trouble = f"{type(error).__name__}: {reason(error)}"
            log.warning("MLflow at %s gets no more of this run (%s)", self._where, self.trouble)

    def _wait_for_news(self) -> None:
        self._news.wait()
        self._closing.wait(self._gather_s)
        self._news.clear()

    def _deliver(self, batch: Batch) -> None:
        if not batch.entries or self._try(batch.entries):
            self._outbox.acknowledge(batch)
        elif "artifact" in batch.entries[0]:
            self._outbox.postpone(batch)

    def _deliver_postponed(self, entry: Entry) -> None:
        if self._try([entry]):
            self._outbox.settle(entry)
        else:
            self._pause("files")

    def _try(self, entries: Sequence[Entry]) -> bool:
        kind = "files" if "artifact" in entries[0] else "lines"
        self._sends_file = kind == "files"
        try:
            with self._turn:
                self._tell(entries)
        except GoneError:
            raise
        except Exception as error:
            self._note_failure(kind, error)
            return False
        finally:
            self._sends_file = False
        if self._tries[kind] and not self._over.is_set():
            log.info(f"MLflow at {self._where} answers again: what it missed is told now")
        self._tries[kind], self._last_success = 0, time.monotonic()
        return True

    def _note_failure(self, kind: str, error: Exception) -> None:
        self.trouble = reason(error)
        is_first, self._tries[kind] = not self._tries[kind], self._tries[kind] + 1
        if is_first and not self._over.is_set():
            log.warning(
                "MLflow at %s fails (%s): this goes on without it, and what it misses is kept and told again",
                self._where,
                self.trouble[:200],
            )
        if kind == "lines":
            self._pause(kind)

    def _pause(self, kind: str) -> None:
        pause = _PAUSES_S[min(self._tries[kind], len(_PAUSES_S)) - 1]
        self._over.wait(min(pause, 0.5) if self._closing.is_set() else pause)
