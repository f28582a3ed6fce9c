"""Jobs that take turns: each runs in a thread of its own, one at a time, and waits where it says so.

A job is a deep nest of open things (a run, files, a training), which stay as they are while it waits. What a thread
shares with its process is put back when its turn comes: random generators, log handlers, environment, the patience
with signals, and what a launcher adds. Signals come to the main thread, and so to whoever's turn it is.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

from lora_exp.machine import signals
from lora_exp.training.state import generators, load_generators

_Result = TypeVar("_Result")
Take = Callable[[], Callable[[], object]]  # notes something of the process, and returns what puts it back
_local = threading.local()


class Turn(Generic[_Result]):
    """A job and its thread. ``asked`` is what it waits for, until it has ended with its ``result`` or ``error``.

    ``is_joined``: whether it is to share passes with others.
    """

    def __init__(
        self, name: str, work: Callable[[], _Result], also: Sequence[Take] = (), is_joined: bool = False
    ) -> None:
        self.name, self._work, self._also, self.is_joined = name, work, also, is_joined
        self.asked: Any = None
        self.result: _Result | None = None
        self.error: BaseException | None = None
        self.is_over = False
        self._back, self._mine = threading.Event(), threading.Event()
        self._reply: Callable[[], Any] = lambda: None
        self._put_back: list[Callable[[], object]] = []
        self._thread = threading.Thread(target=self._run, name=f"lane {name}", daemon=True)

    def go_on(self, reply: Callable[[], Any] = lambda: None) -> None:
        """Give it its turn, until it waits again or has ended. ``reply`` is called there: it gives what was asked for,
        or raises."""
        self._reply, self.asked = reply, None
        outside = _noted(self._also)
        for put_back in self._put_back:
            put_back()
        self._back.clear()
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._mine.set()
        self._wait_for_it()
        self._put_back = [] if self.is_over else _noted(self._also)
        if self.is_over:
            self._thread.join()
            _close_files()
        for put_back in outside:
            put_back()

    def wait_for(self, asked: object) -> Any:
        """In its thread: give the turn back until ``asked`` is answered."""
        self.asked = asked
        self._mine.clear()
        self._back.set()
        self._mine.wait()
        return self._reply()

    def _run(self) -> None:
        _local.turn = self
        try:
            self.result = self._work()
        except BaseException as error:
            self.error = error
        self.is_over = True
        self._back.set()

    def _wait_for_it(self) -> None:
        """A signal that is to end what runs now raises in the main thread, which only waits: it is passed on."""
        while not self._back.is_set():
            try:
                self._back.wait()
            except signals.Stopped:
                assert self._thread.ident is not None
                number = ctypes.c_ulong(self._thread.ident)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(number, ctypes.py_object(_StoppedHere))


class _StoppedHere(signals.Stopped):
    """``Stopped`` as a class that needs nothing to be raised."""

    def __init__(self) -> None:
        super().__init__(signals.received() or 2)


def current() -> Turn[Any] | None:
    """Whose turn it is, asked in its thread; None in any other."""
    return getattr(_local, "turn", None)


def _noted(also: Sequence[Take]) -> list[Callable[[], object]]:
    return [take() for take in (_random, _log_handlers, _environment, signals.patience, *also)]


def _random() -> Callable[[], object]:
    state = generators()
    return lambda: load_generators(state)


def _log_handlers() -> Callable[[], object]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level

    def put_back() -> None:
        root.handlers[:] = handlers
        root.setLevel(level)

    return put_back


def _close_files() -> None:
    """A job that has ended needs its log file no more, which Hydra leaves open."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()


def _environment() -> Callable[[], object]:
    before = dict(os.environ)

    def put_back() -> None:
        for name in os.environ.keys() - before.keys():
            del os.environ[name]
        os.environ.update({name: value for name, value in before.items() if os.environ.get(name) != value})

    return put_back
