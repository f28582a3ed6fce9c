"""Artifacts on the disk that the job's own files are on: large ones are stored once.

Two names of one file are safe as long as nobody writes into it: what replaces a file or removes it leaves the other
name alone. So only what is replaced whole is linked (an adapter's weights), and it is made read-only.
"""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

_LINKED = (".safetensors",)


def local_folder(artifact_uri: str) -> Path | None:
    """The folder behind the artifact address of a run; None if it is not on this machine."""
    parts = urlsplit(artifact_uri)
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Path(url2pathname(parts.path))
    return Path(artifact_uri) if parts.scheme == "" else None


def store(path: Path, folder: Path) -> None:
    """Put a file, or what is in a folder, into ``folder``: linked where that is safe and possible, else copied."""
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        target = folder / (file.relative_to(path) if path.is_dir() else file.name)
        if file.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            _place(file, target)


def _place(file: Path, target: Path) -> None:
    """Whole or not at all, and without writing into what is there."""
    with tempfile.TemporaryDirectory(prefix=".new.", dir=target.parent) as folder:
        temporary = Path(folder) / file.name
        if file.suffix not in _LINKED or not _linked(file, temporary):
            shutil.copy2(file, temporary)
        temporary.replace(target)


def _linked(file: Path, target: Path) -> bool:
    try:
        os.link(file, target)
    except OSError:  # another file system, or one that has no links
        return False
    file.chmod(stat.S_IMODE(file.stat().st_mode) & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    return True
