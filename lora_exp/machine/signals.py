"""Signals that ask the process to end: noted when they come, obeyed where nothing is half done.

An exception that is raised wherever a signal happens to hit can be lost (a finaliser ignores it) and can leave half a
file or a run that stays open. So a signal is a note, and ``obey`` raises between steps. Where nothing can be left half
done a first signal raises at once (``at_once``), elsewhere a second one, and while things are closed only a third.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
_SAME_REQUEST_S = 0.3  # a terminal, its shell and a `timeout` may each send on one and the same wish


class Stopped(SystemExit):
    """The process was asked to end. ``code`` is what a shell expects: 128 + the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number

    def __str__(self) -> str:
        return signal.Signals(self.number).name


_Handler = signal.Handlers | int | Callable[[int, FrameType | None], object] | None


@dataclass
class _State:
    """``first``: the signal that counts, ``requests``: how often the process was asked, ``borne``: how many requests
    are only noted here, ``tell``: who else hears of each, ``held``: whether ``obey`` waits."""

    first: int | None = None
    requests: int = 0
    last: float = 0.0
    borne: int = 1
    tell: Callable[[int, int], object] | None = None
    held: bool = False
    is_over: bool = False
    hook: Callable[[sys.UnraisableHookArgs], object] = sys.__unraisablehook__
    previous: dict[int, _Handler] = field(default_factory=dict)


_state = _State()


def install() -> None:
    """Note signals from now on. One that is ignored (``nohup``, the background of a shell) stays ignored."""
    uninstall()
    if threading.current_thread() is not threading.main_thread():
        return
    for name in _NAMES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
            _state.previous[number] = signal.signal(number, _note)
    _state.hook, sys.unraisablehook = sys.unraisablehook, _quiet_about_signals


def uninstall() -> None:
    """What ``install`` found is in force again, and what came since is forgotten."""
    global _state
    while _state.previous:
        signal.signal(*_state.previous.popitem())
    if sys.unraisablehook is _quiet_about_signals:
        sys.unraisablehook = _state.hook
    _state = _State()


@contextlib.contextmanager
def noted() -> Iterator[None]:
    """``install`` for a block, unless it is in force already: for jobs in a launcher's own processes."""
    if _state.previous:
        yield
        return
    install()
    try:
        yield
    finally:
        uninstall()


def received() -> int | None:
    """The first signal since ``install``."""
    return _state.first


def is_pressing() -> bool:
    """Whether the process was asked more than once, so that nothing more is to be waited for."""
    return _state.requests > 1


def obey() -> None:
    """End here if a signal has come."""
    if _state.first is not None and not _state.held:
        raise Stopped(_state.first)


def answered() -> None:
    """What a signal asked for is done: a conversation in the terminal has ended, and nothing else is to."""
    _state.first, _state.requests = None, 0


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """For long phases that leave nothing half done, such as loading."""
    obey()
    with _borne(0):
        yield
    obey()  # a library may have caught what was raised


def between_steps() -> contextlib.AbstractContextManager[None]:
    """For work that calls ``obey`` itself; a second signal ends it at once."""
    return _borne(1)


def patience() -> Callable[[], None]:
    """How many requests are only noted, as it is now; returns what brings that back."""
    before = _state.borne

    def put_back() -> None:
        _state.borne = before

    return put_back


@contextlib.contextmanager
def held() -> Iterator[None]:
    """For work that several processes do in step: they agree where to end, and ``obey`` ends none of them alone."""
    before, _state.held = _state.held, True
    try:
        yield
    finally:
        _state.held = before


@contextlib.contextmanager
def passed_on(tell: Callable[[int, int], object]) -> Iterator[None]:
    """For a wait for other processes: ``tell`` gets each request, as the first signal and how many requests there have
    been. The first two are for those others; a third one ends the wait."""
    obey()
    before, _state.tell = _state.tell, tell
    try:
        with _borne(2):
            yield
    finally:
        _state.tell = before


def ask(number: int, requests: int) -> None:
    """From another thread: see to it that this process has been asked as often as ``requests`` says."""
    if _state.requests < requests and number in _state.previous:
        _thread.interrupt_main(signal.Signals(number))


def while_closing() -> contextlib.AbstractContextManager[None]:
    """For what must be written even after a second signal; a third one ends it."""
    return _borne(2)


def over() -> None:
    """All is closed: a signal that still comes ends the process, without a word."""
    sys.stdout.flush()
    sys.stderr.flush()
    _state.is_over = True


def stop_behind(error: BaseException | None) -> Stopped | None:
    """The ``Stopped`` that ``error`` is, or that a library turned into it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


@contextlib.contextmanager
def _borne(requests: int) -> Iterator[None]:
    before, _state.borne = _state.borne, requests
    try:
        yield
    finally:
        _state.borne = before


def _note(number: int, frame: FrameType | None) -> None:
    del frame
    if _state.is_over:
        os._exit(128 + number)
    now = time.monotonic()
    if _state.requests and now - _state.last < _SAME_REQUEST_S:
        return
    _state.first = _state.first or number
    _state.requests, _state.last = _state.requests + 1, now
    if _state.tell is not None:
        _state.tell(_state.first, _state.requests)
    if _state.requests > _state.borne:
        raise Stopped(_state.first)


def _quiet_about_signals(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, Stopped):  # that one is noted, and obeyed later
        _state.hook(unraisable)
