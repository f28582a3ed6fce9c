"""A folder belongs to one process at a time: two jobs in one would overwrite each other's files."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from lora_exp.errors import UserError
from lora_exp.machine.process import Process

_LOCK, _OWNER = ".in_use.lock", ".in_use.json"
_mine: dict[Path, FileLock] = {}


class FolderInUseError(UserError):
    """Another process works in the folder."""


def claim(folder: Path, setting: str) -> None:
    """Take ``folder`` for this process until ``release``, or until the process ends, however it does.

    Raises ``FolderInUseError``, which names the config's ``setting`` to change.
    """
    folder = folder.resolve()
    if folder in _mine:
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise FolderInUseError(
            f"{folder} is in use by {_name(owner(folder))}: wait for it, or choose another folder with {setting}=FOLDER"
        ) from None
    except (NotImplementedError, OSError):  # a file system without locks, or one that is read-only: said elsewhere
        return
    _mine[folder] = lock
    with contextlib.suppress(OSError):
        (folder / _OWNER).write_text(str(Process.mine()))


def release(folder: Path) -> None:
    """Give ``folder`` back."""
    lock = _mine.pop(folder.resolve(), None)
    if lock is not None:
        with contextlib.suppress(OSError):
            (folder / _OWNER).unlink()
        lock.release()


def release_all() -> None:
    """Give back what this process still has."""
    for folder in list(_mine):
        release(folder)


@contextlib.contextmanager
def claimed(folder: Path, setting: str) -> Iterator[None]:
    """``folder`` is this process's for a block; if it was already, it stays so."""
    had = folder.resolve() in _mine
    claim(folder, setting)
    try:
        yield
    finally:
        if not had:
            release(folder)


def is_in_use(folder: Path) -> bool:
    """Whether another process has claimed ``folder``, and lives."""
    try:
        with claimed(folder, ""):
            return False
    except FolderInUseError:
        return True
    except OSError:
        return False


def owner(folder: Path) -> Process | None:
    """Who has claimed ``folder``, or had and ended before it could give it back."""
    try:
        return Process.read((folder / _OWNER).read_text())
    except OSError:
        return None


def _name(process: Process | None) -> str:
    return f"process {process.pid} on {process.host}" if process else "another process"
