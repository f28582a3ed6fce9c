"""Folders of a class each: the files of one and what it is called."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def class_folders(folder: Path) -> list[Path]:
    """The folders inside, in order of their names, but hidden ones and those without a file; [] for a file."""
    if not folder.is_dir():
        return []
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    return sorted(path for path in inside if next(files_of(path), None))


def files_of(folder: Path) -> Iterator[Path]:
    """The files of one class, also those in folders below, in order; hidden ones are none of it."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))
