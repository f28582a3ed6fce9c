"""The one thread that owns the model: what waits is read, what runs is gone on with, a token a step.

Whoever waits for the same step shares it, whatever adapter each one asked for. All that touches the model, adding an
adapter to it among them, is done here, between two steps.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor

from lora_exp.use.serving.asked import Asked, Failed, Piece, RefusedRequestError, Written, closing, gone
from lora_exp.use.serving.batch import Batch
from lora_exp.use.serving.sampling import choose, generator_of

if TYPE_CHECKING:
    import torch

    from lora_exp.use.loading import Trained

log = logging.getLogger(__name__)
_T = TypeVar("_T")
_READ_AT_ONCE = 8192  # tokens of prompts, padding included; a longer one is read alone


@dataclass
class Counts:
    """What was done since the start. ``mixed_steps``: those whose sequences went through several adapters."""

    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    prompt_tokens: int = 0
    written_tokens: int = 0
    steps: int = 0
    mixed_steps: int = 0


@dataclass
class _Running:
    """A sequence of the batch. ``last``: the token that the next step begins with."""

    asked: Asked
    generator: torch.Generator
    last: int = 0
    count: int = 0


class Engine:
    """Answers ``size`` requests at a time; up to ``queue`` more wait."""

    def __init__(self, trained: Trained, size: int, queue: int) -> None:
        self.counts = Counts()
        self._batch, self._trained = Batch(trained), trained
        self._size, self._queue = size, queue
        self._running: list[_Running] = []
        self._waiting: deque[Asked] = deque()
        self._work: deque[Callable[[], None]] = deque()
        self._until: float | None = None  # when a closing engine stops going on
        self._known: set[str] = set()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and self._until is None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def submit(self, asked: Sequence[Asked]) -> None:
        """Have prompts answered, all or none. Raises RefusedRequestError where too many wait."""
        with self._changed:
            if self._until is not None:
                raise closing()
            free = self._size - len(self._running) + self._queue
            if len(self._waiting) + len(asked) > free:
                self.counts.refused += 1
                raise RefusedRequestError(
                    f"{len(self._waiting)} requests wait already, and serve.queue={self._queue}: ask again later",
                    429,
                    "rate_limit_exceeded",
                )
            self.counts.requests += 1
            self._waiting.extend(asked)
            self._changed.notify()

    def between_steps(self, work: Callable[[], _T]) -> Future[_T]:
        """Have the model's thread do something that no step may see half done."""
        done: Future[_T] = Future()

        def do() -> None:
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        with self._changed:
            if self._until is not None:
                raise closing()
            self._work.append(do)
            self._changed.notify()
        return done

    def admit(self, adapter: str) -> None:
        """In the model's thread: requests for it are answered from now on."""
        self._known.add(adapter)

    def drop(self, adapter: str, reason: RefusedRequestError) -> None:
        """In the model's thread: no request for it is answered any more, those in flight among them."""
        self._known.discard(adapter)
        self._fail([each.asked for each in self._running if each.asked.adapter == adapter], reason)
        self._let_go(lambda each: each.asked.adapter != adapter)

    def close(self, grace_s: float) -> None:
        """Refuse what waits and what comes; what runs after ``grace_s`` seconds is cut off. Does not wait for it."""
        with self._changed:
            until = time.monotonic() + grace_s
            self._until = until if self._until is None else min(self._until, until)
            self._changed.notify()

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; whether it came."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # In the model's thread

    def _run(self) -> None:
        while self._next():
            pass

    def _next(self) -> bool:
        """One step, reading of prompts among them; whether there will be another."""
        with self._changed:
            while not (self._waiting or self._work or self._running or self._until is not None):
                self._changed.wait()
            work, self._work = self._work, deque()
        for do in work:
            do()
        self._clear_waiting()
        if self._until is not None and time.monotonic() >= self._until:
            self._fail([each.asked for each in self._running], closing())
            self._let_go(lambda each: False)
        try:
            self.counts.cancelled += sum(each.asked.is_cancelled for each in self._running)
            self._let_go(lambda each: not each.asked.is_cancelled)
            self._go_on(self._admitted())
        except Exception:  # the requests at hand are lost; the model serves those that follow
            log.exception("A step failed, and with it the requests in it")
            said = "the server failed at this request, or at one beside it: its log says at what"
            self._fail([each.asked for each in self._running], RefusedRequestError(said, 500))
            self._running, self._batch = [], Batch(self._trained)
        with self._changed:
            return self._until is None or bool(self._running or self._waiting or self._work)

    def _clear_waiting(self) -> None:
        """Take out what nobody waits for, what asks for an adapter that is gone, and all once the engine closes."""
        with self._changed:
            waiting, self._waiting = list(self._waiting), deque()
            for asked in waiting:
                if asked.is_cancelled:
                    self.counts.cancelled += 1
                elif self._until is not None:
                    self._fail([asked], closing())
                elif asked.adapter not in self._known:
                    self._fail([asked], gone())
                else:
                    self._waiting.append(asked)

    def _admitted(self) -> list[_Running]:
        """As many of those that wait as there is room for, together not longer than what is read at once."""
        found: list[_Running] = []
        with self._changed:
            longest = 0
            while self._waiting and len(self._running) + len(found) < self._size:
                longest = max(longest, len(self._waiting[0].prompt))
                if found and longest * (len(found) + 1) > _READ_AT_ONCE:
                    break
                asked = self._waiting.popleft()
                found.append(_Running(asked, generator_of(asked.sampling)))
        return found

    def _go_on(self, new: list[_Running]) -> None:
        """Read the prompts of ``new``, or write a token of each sequence that runs."""
        if new:
            before = self._running
            self._running = [*before, *new]  # first, so that they hear of it if it fails
            logits, order = self._batch.join([each.asked.prompt for each in new], [each.asked.adapter for each in new])
            self._running = [self._running[place] for place in order]
            self.counts.prompt_tokens += sum(len(each.asked.prompt) for each in new)
            self._write(new, logits)
        elif self._running:
            logits = self._batch.step([each.last for each in self._running])
            self.counts.mixed_steps += len({each.asked.adapter for each in self._running}) > 1
            self._write(self._running, logits)
        else:
            return
        self.counts.steps += 1

    def _write(self, rows: Sequence[_Running], logits: Tensor) -> None:
        """Give each of ``rows`` its next token; those that end with it leave."""
        samplings, generators = [each.asked.sampling for each in rows], [each.generator for each in rows]
        written = choose(logits, samplings, generators, [each.asked.logprobs for each in rows])
        self.counts.written_tokens += len(rows)
        ended = {id(each) for each, token in zip(rows, written, strict=True) if _took(each, token)}
        self._let_go(lambda each: id(each) not in ended)

    def _let_go(self, stays: Callable[[_Running], bool]) -> None:
        kept = [place for place, each in enumerate(self._running) if stays(each)]
        if len(kept) < len(self._running):
            self._running = [self._running[place] for place in kept]
            self._batch.keep(kept)

    def _fail(self, asked: Collection[Asked], error: Exception) -> None:
        for each in asked:
            with contextlib.suppress(RuntimeError):  # whoever waited is gone with their event loop
                each.tell(Failed(error))


def _took(running: _Running, written: Written) -> bool:
    """Whether a sequence ends with this token; whoever asked is told of it."""
    asked, running.last = running.asked, written.token
    running.count += 1
    if written.token in asked.ends:
        text, finish = asked.writer.rest(), "stop"
    else:
        text = asked.writer.add(written.token)
        finish = "stop" if asked.writer.is_stopped else "length" if running.count >= asked.most else ""
        text += asked.writer.rest() if finish == "length" else ""
    with contextlib.suppress(RuntimeError):
        asked.tell(Piece(text, (written,), finish or None))
    return bool(finish)
