"""Which folders hold a job of an identity, and who is at work on one: ``outputs/.jobs``, a folder an identity.

It holds no result, only where to look for one: a folder that has moved away is not found, and nothing else happens.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path

from lora_exp.job import RESULT_FILE, Result, read_outcome
from lora_exp.machine import claims, signals
from lora_exp.machine.claims import FolderInUseError
from lora_exp.use.best import OUTPUTS

log = logging.getLogger(__name__)
_PLACE, _FOLDERS = OUTPUTS / ".jobs", "folders"
_POLL_S = 0.5
_mine: list[str] = []  # the identities that this process has claimed


def folders(identity: str) -> list[Path]:
    """Those in which a job of this identity has begun, the newest first, as far as they are there."""
    try:
        lines = (_PLACE / identity / _FOLDERS).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    places = [(OUTPUTS / line).resolve() for line in reversed(lines)]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def note(identity: str, folder: Path) -> None:
    """A job of this identity begins in ``folder``."""
    place = _PLACE / identity
    named = os.path.relpath(folder.resolve(), OUTPUTS.resolve())
    with contextlib.suppress(OSError):  # nothing of it is needed for the job itself
        place.mkdir(parents=True, exist_ok=True)
        if folder.resolve() not in folders(identity):
            with (place / _FOLDERS).open("a", encoding="utf-8") as stream:
                stream.write(f"{named}\n")


@contextlib.contextmanager
def claimed(identity: str, waits: bool) -> Iterator[None]:
    """The identity is this process's for a block: of jobs that are the same the second ``waits``, or does not care.

    The claim of a process that is gone is none. Who has a claim already waits for no other, as two could wait for each
    other: a launcher with several jobs open at once runs one that is another's as well. What lies below ``outputs/`` is
    looked through where it is not known.
    """
    place = _PLACE / identity
    if not _PLACE.is_dir():
        _look_around()
    with contextlib.ExitStack() as stack:
        while not _taken(stack, place):
            if not waits or _mine:
                break
            _wait(place)
        else:
            _mine.append(identity)
            stack.callback(_mine.remove, identity)
        yield


def _taken(stack: contextlib.ExitStack, place: Path) -> bool:
    try:
        stack.enter_context(claims.claimed(place, "sweep.reuse"))
    except FolderInUseError:
        return False
    except OSError:  # nowhere to claim it
        return True
    return True


def _wait(place: Path) -> None:
    """Until whoever has it may have given it back."""
    who = claims.owner(place)
    named = f"process {who.pid} on {who.host}" if who else "another process"
    log.info(f"job    waits for {named}, which runs the same one; sweep.reuse=false would run it beside")
    while claims.is_in_use(place):
        signals.obey()
        time.sleep(_POLL_S)


def _look_around() -> None:
    """Note what was brought here without ``outputs/.jobs``."""
    for pattern in (f"runs/*/*/{RESULT_FILE}", f"sweeps/*/*/*/{RESULT_FILE}"):
        for file in sorted(OUTPUTS.glob(pattern)):
            with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
                outcome = read_outcome(file.parent)
                result = outcome.result if outcome is not None else None
                if isinstance(result, Result) and result.identity:
                    _PLACE.mkdir(parents=True, exist_ok=True)
                    note(result.identity, file.parent)
