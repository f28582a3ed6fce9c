"""A sweep that is asked to stop tells its jobs so by a file in its folder, wherever they run.

A signal reaches the process that launches the jobs, but of their own processes only those on this machine, and there
any of them, at any moment: also one that has no job just now, whose end would break a pool of processes.
"""

from __future__ import annotations

import contextlib
import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from lora_exp.adapters.files.whole import write_text
from lora_exp.machine import signals
from lora_exp.machine.claims import owner

_FILE = ".stop.json"
_LOOK_EVERY_S = 0.3


@contextlib.contextmanager
def passed_on(folder: Path) -> Iterator[None]:
    """For the process that launches the jobs of the sweep in ``folder`` and waits for them: signals are told to them.

    Raises ``Stopped`` at the block's end if there was one.
    """
    (folder / _FILE).unlink(missing_ok=True)

    def tell(number: int, requests: int) -> None:
        with contextlib.suppress(OSError):  # a full disk: the next request is told again
            write_text(folder / _FILE, json.dumps({"signal": number, "requests": requests}))

    with signals.passed_on(tell):
        yield
    signals.obey()


@contextlib.contextmanager
def heeded(folder: Path) -> Iterator[None]:
    """For a job in another process: what is asked of its sweep in ``folder`` is asked of it too.

    A sweep whose launching process is gone, by kill -9 say, asks for nothing any more: its jobs end as by SIGTERM.
    """
    over = threading.Event()
    looking = threading.Thread(target=_look, args=(folder, over), daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def is_asked(folder: Path) -> bool:
    """Whether the sweep in ``folder`` is to stop, so that no job of it should begin."""
    return _asked(folder) is not None


@contextlib.contextmanager
def deaf_children(*numbers: int) -> Iterator[None]:
    """Processes that are begun meanwhile do not hear these signals, which a terminal sends to all it has started.

    A process that is begun inherits the mask of the thread that begins it; this one's signals come by another thread.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    over = threading.Event()
    threading.Thread(target=over.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        over.set()


@contextlib.contextmanager
def hearing() -> Iterator[None]:
    """Inside a deaf process: for as long as it has a job, which knows what to do with a signal."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _look(folder: Path, over: threading.Event) -> None:
    launching = owner(folder)
    while not over.wait(_LOOK_EVERY_S):
        if asked := _asked(folder):
            signals.ask(*asked)
        elif launching is not None and launching.is_gone():
            signals.ask(signal.SIGTERM, 1)


def _asked(folder: Path) -> tuple[int, int] | None:
    """The first signal and how many requests there have been."""
    try:
        found = json.loads((folder / _FILE).read_text())
    except (OSError, ValueError):
        return None
    return found["signal"], found["requests"]
