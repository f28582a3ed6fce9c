"""Where the records of any kind of data come from, and which split has which.

A kind asks ``records(section, "train", bad)``, and the same for "validation" and "test". No record is in two splits:
one that equals a record of the test split is left out of the others, and one that equals a held-out one is not trained
on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from lora_exp.config import DataConfig
from lora_exp.data.broken import BadRecords, Broken
from lora_exp.data.formats import Read, Record, read_file
from lora_exp.data.hub import hub_source
from lora_exp.data.items import Items, Source
from lora_exp.data.split import SPLITS
from lora_exp.errors import UserError
from lora_exp.inputs import RECORD_SUFFIXES, find_files, weights_of
from lora_exp.machine.cache import known_sha256
from lora_exp.machine.packaged import find_packaged, install_line

__all__ = [
    "BadRecords",
    "Broken",
    "Items",
    "Record",
    "Source",
    "fingerprint",
    "held_out_fractions",
    "records",
    "source_name",
    "sources_of",
    "unread_files",
]

Find = Callable[[DataConfig, str], list[Source]]
# Where sources are found, which the content of each tells better.
ELSEWHERE = ("label", "path", "packaged", "name", "revision", "validation_path", "test_path", "cache_dir")


@dataclass(frozen=True)
class FileSource:
    path: Path
    weight: float = 1.0

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> Read:
        return read_file(self.path)

    def identity(self) -> list[object]:
        return [known_sha256(self.path), self.path.suffix.lower(), self.weight]


def records(
    section: DataConfig, split: str, bad: BadRecords, problem: Callable[[Record], str | None] | None = None
) -> Iterator[tuple[str, Record]]:
    """The records of ``split`` (train, validation, test), each with its place for messages, such as "FILE, line 12".

    What is broken goes to ``bad``, as does, before the splits are made, a record of which ``problem`` says why it
    cannot be used. Raises UserError for sources that cannot be had, and, before the first record, if more is broken
    than ``data.max_bad_fraction``. Nothing is yielded for a test split that is not asked for.
    """

    def read(source: Source) -> Read:
        for where, record in source.read():
            reason = None if problem is None or isinstance(record, Broken) else problem(record)
            yield where, record if reason is None else Broken(reason)

    sources = {name: sources_of(section, name) for name in SPLITS}
    return Items(section, sources, read, held_out_fractions(section, sources)).of(split, bad)


def sources_of(section: DataConfig, split: str) -> list[Source]:
    """The sources that a split has for itself; validation and test may have none, and get a share of the training's.

    Raises UserError for what is missing or cannot be read, with the next move.
    """
    if split != "train":
        path, hub_split = getattr(section, f"{split}_path"), getattr(section, f"{split}_split")
        found = _files(section, path, f"data.{split}_path")
        return [*found, *([hub_source(section, hub_split)] if hub_split else [])]
    if section.path is not None:
        kept_back = {Path(source.name).resolve() for each in SPLITS[1:] for source in sources_of(section, each)}
        files = [each for each in _files(section, section.path, "data.path") if each.path.resolve() not in kept_back]
        if not files:
            raise UserError(f"data.path={section.path} has no file that is not held out: name others to train on")
        return [*files]
    return [hub_source(section, section.split or "train") if section.name else _packaged(section)]


def fingerprint(section: DataConfig, *parts: object, find: Find | None = None) -> str:
    """The hash of all that the rows follow from: the content of every source, the fields of the kind, and ``parts``.

    ``find``: what finds the sources of a split where it is not ``sources_of``.
    """
    sources = {split: [source.identity() for source in (find or sources_of)(section, split)] for split in SPLITS}
    values = {each.name: getattr(section, each.name) for each in fields(section) if each.name not in ELSEWHERE}
    return hashlib.sha256(json.dumps([sources, values, parts], default=str).encode()).hexdigest()[:20]


def held_out_fractions(section: DataConfig, sources: Mapping[str, list[Source]]) -> tuple[float, float]:
    """What is held out of the training's sources for validation and test: nothing for a split with its own."""
    validation = 0.0 if sources["validation"] else section.val_fraction
    return validation, 0.0 if sources["test"] else section.test_fraction


def unread_files(section: DataConfig) -> list[str]:
    """Which files of folders are not read, in words."""
    said = []
    for key in ("path", "validation_path", "test_path"):
        for path in weights_of(getattr(section, key)):
            if others := find_files(path, _suffixes(section), f"data.{key}")[1]:
                named = ", ".join(file.name for file in others[:5]) + (", …" if len(others) > 5 else "")
                said.append(f"{len(others)} files in {path} are not read: {named}")
    return said


def source_name(section: DataConfig) -> str:
    """Where the data come from, in a few words for messages."""
    return str(section.path or section.name or "packaged")


def _files(section: DataConfig, named: object, key: str) -> list[FileSource]:
    return [
        FileSource(file, weight)
        for path, weight in weights_of(named).items()
        for file in find_files(path, _suffixes(section), key)[0]
    ]


def _suffixes(section: DataConfig) -> tuple[str, ...]:
    return getattr(section, "suffixes", ()) or RECORD_SUFFIXES


def _packaged(section: DataConfig) -> Source:
    if section.packaged is None:
        raise UserError(f"data={section.label} names no source: add data.path=FILE_OR_FOLDER or data.name=ORG/NAME")
    packaged = find_packaged(section.packaged)
    if packaged is None:
        raise UserError(
            f"data={section.label} is not installed: {install_line(section.packaged)}, "
            "or take your own with data.path=FILE_OR_FOLDER"
        )
    return FileSource(packaged)
