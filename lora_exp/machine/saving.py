"""A folder that is replaced as one thing: whenever the process ends, a whole one is there or is put back.

New files go into ``.NAME.writing``, which is renamed ``.NAME.new`` when it is whole. Linux then exchanges it with the
old folder in one step. Elsewhere two renames do it, and ``recover`` mends what an end between them leaves.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from lora_exp.machine.cache import file_sha256

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Put what ``write`` fills a new folder with in the place of ``folder``. A failure leaves the old one whole."""
    recover(folder)
    writing, new, old = _beside(folder)
    try:
        write(writing)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)  # on a full disk others need the room, too
        raise
    writing.rename(new)
    if not folder.exists():
        new.rename(folder)
    elif not _exchanged(new, folder):
        folder.rename(old)
        new.rename(folder)
    for rest in (new, old):
        shutil.rmtree(rest, ignore_errors=True)


def recover(folder: Path) -> None:
    """Put a whole ``folder`` back if an earlier process ended while it replaced it, and remove what else it left."""
    writing, new, old = _beside(folder)
    whole = next((place for place in (new, old) if place.is_dir()), None)
    if whole is not None and not folder.exists():
        whole.rename(folder)
    for rest in (writing, new, old):
        shutil.rmtree(rest, ignore_errors=True)


def weight_files(folder: Path) -> list[Path]:
    """Those of a folder that hold what was trained."""
    return sorted(folder.glob("*.safetensors"))


def weights_sha256(folder: Path) -> str:
    """The SHA-256 of each of them, joined by commas; empty where there are none."""
    return ",".join(file_sha256(file) for file in weight_files(folder))


def open_as_umask_says(folder: Path) -> None:
    """Let the umask decide who may read what is in ``folder``: safetensors makes its files for the owner alone."""
    probe = folder / ".mode"
    probe.touch()
    mode = probe.stat().st_mode & 0o777
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def _beside(folder: Path) -> tuple[Path, Path, Path]:
    writing, new, old = (folder.with_name(f".{folder.name}.{stage}") for stage in ("writing", "new", "old"))
    return writing, new, old


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the two changed places in one step, which not every system and not every file system can."""
    call = _renameat2()
    return call is not None and call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


@functools.cache
def _renameat2() -> Callable[..., int] | None:
    if sys.platform != "linux":
        return None
    call = getattr(ctypes.CDLL(None), "renameat2", None)  # glibc 2.28
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    renamed: Callable[..., int] | None = call
    return renamed
