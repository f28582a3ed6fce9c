"""Where the records of any kind of data come from, and which split has which.

A kind asks ``records(section, "train", bad)``, and the same for "validation" and "test". No record is in two splits:
one that equals a record of the test split is left out of the others, and one that equals a held-out one is not trained
on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from lora_exp.config import DataConfig
from lora_exp.data.broken import BadRecords, Broken
from lora_exp.data.formats import Read, Record, read_file
from lora_exp.data.hub import hub_source
from lora_exp.data.split import SPLITS, TEST, VALIDATION, shares
from lora_exp.errors import UserError
from lora_exp.inputs import RECORD_SUFFIXES, find_files, weights_of
from lora_exp.machine.cache import file_sha256
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

_Item = TypeVar("_Item")
_ELSEWHERE = ("label", "path", "packaged", "name", "revision", "validation_path", "test_path", "cache_dir")


class Source(Protocol):
    """One file, or one split of a dataset of the hub. ``weight``: how often an epoch has each of its records."""

    @property
    def name(self) -> str: ...

    @property
    def weight(self) -> float: ...

    def read(self) -> Read:
        """Its records, each with its place; what is broken with its reason."""

    def identity(self) -> list[object]:
        """What changes when its content does."""


Find = Callable[[DataConfig, str], list[Source]]


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
        state = self.path.stat()
        return [_sha256(self.path, state.st_mtime_ns, state.st_size), self.path.suffix.lower(), self.weight]


def records(
    section: DataConfig,
    split: str,
    bad: BadRecords,
    problem: Callable[[Record], str | None] | None = None,
    is_divided: bool = True,
) -> Iterator[tuple[str, Record]]:
    """The records of ``split`` (train, validation, test), each with its place for messages, such as "FILE, line 12".

    What is broken goes to ``bad``, as does, before the splits are made, a record of which ``problem`` says why it
    cannot be used. Raises UserError for sources that cannot be had, and, before the first record, if more is broken
    than ``data.max_bad_fraction``. Nothing is yielded for a test split that is not asked for. With ``is_divided`` false
    nothing is held out of the training's sources, as of a kind that does so itself: a split has its own sources alone.
    """

    def read(source: Source) -> Read:
        for where, record in source.read():
            reason = None if problem is None or isinstance(record, Broken) else problem(record)
            yield where, record if reason is None else Broken(reason)

    sources = {name: sources_of(section, name) for name in SPLITS}
    fractions = held_out_fractions(section, sources) if is_divided else (0.0, 0.0)
    return Items(section, sources, read, fractions).of(split, bad)


def sources_of(section: DataConfig, split: str) -> list[Source]:
    """The sources that a split has for itself; validation and test may have none, and get a share of the training's.

    Raises UserError for what is missing or cannot be read, with the next move.
    """
    if split != "train":
        path, hub_split = getattr(section, f"{split}_path"), getattr(section, f"{split}_split")
        found = _files(section, path, f"data.{split}_path")
        return [*found, *([hub_source(section, hub_split)] if hub_split else [])]
    if section.path is not None:
        kept_back = {source.name for each in SPLITS[1:] for source in sources_of(section, each)}
        files = [file for file in _files(section, section.path, "data.path") if file.name not in kept_back]
        if not files:
            raise UserError(f"data.path={section.path} has no file that is not held out: name others to train on")
        return files
    return [hub_source(section, section.split or "train") if section.name else _packaged(section)]


def fingerprint(section: DataConfig, *parts: object, find: Find | None = None) -> str:
    """The hash of all that the rows follow from: the content of every source, the fields of the kind, and ``parts``.

    ``find``: what finds the sources of a split where it is not ``sources_of``.
    """
    sources = {split: [source.identity() for source in (find or sources_of)(section, split)] for split in SPLITS}
    values = {each.name: getattr(section, each.name) for each in fields(section) if each.name not in _ELSEWHERE}
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


class Items(Generic[_Item]):
    """What ``read`` makes of sources, divided among the splits. All is read once to be counted and compared.

    Raises UserError if more of it is broken than may be, or if there is too little to hold anything out.
    """

    def __init__(
        self,
        section: DataConfig,
        sources: Mapping[str, list[Source]],
        read: Callable[[Source], Iterator[tuple[str, _Item | Broken]]],
        fractions: tuple[float, float],
        unit: str = "record",
        may_be_few: bool = False,
    ) -> None:
        self._section, self._sources, self._read = section, sources, read
        bad = BadRecords(section.max_bad_fraction)
        self._digests = {split: self._look(split, bad) for split in SPLITS}
        bad.check()
        self.count = sum(map(len, self._digests["train"]))
        self._shares = self._divide(fractions, unit, may_be_few)
        self._held = {split: self._digests_of(split) for split in SPLITS[1:]}

    def of(self, split: str, bad: BadRecords) -> Iterator[tuple[str, _Item]]:
        """The items of a split; to be trained on as often as their source's weight says."""
        is_own = bool(self._sources[split])
        home, wanted, twins, start = split if is_own else "train", SPLITS.index(split), self._twins(split), 0
        for number, (source, digests) in enumerate(zip(self._sources[home], self._digests[home], strict=True)):
            theirs = self._shares[start : start + len(digests)] if home == "train" else bytes([wanted]) * len(digests)
            start += len(digests)
            chosen = bytearray(share == wanted for share in theirs)
            distinct = bytearray(share and digest not in twins for share, digest in zip(chosen, digests, strict=True))
            bad.seen += sum(chosen)
            bad.shared += sum(chosen) - sum(distinct)
            if is_own or any(distinct):
                weight = source.weight if split == "train" else 1.0
                yield from self._passes(source, distinct, weight, number, bad if is_own else None)

    def _twins(self, split: str) -> set[int]:
        """What a split may not have, as another that is held out before it has it."""
        if split == "train":
            return self._held["validation"] | self._held["test"]
        return self._held["test"] if split == "validation" else set()

    def _passes(
        self, source: Source, chosen: bytearray, weight: float, number: int, bad: BadRecords | None
    ) -> Iterator[tuple[str, _Item]]:
        """The chosen items ``weight`` times: whole passes, so that no item follows itself, then a drawn part."""
        whole = int(weight)
        passes = [chosen] * whole
        if part := round((weight - whole) * sum(chosen)):
            passes.append(_drawn(chosen, part, f"{self._section.sample_seed} {number}"))
        for index, here in enumerate(passes or [bytearray(len(chosen))]):
            yield from self._pass(source, here, bad if index == 0 else None)

    def _pass(self, source: Source, chosen: bytearray, bad: BadRecords | None) -> Iterator[tuple[str, _Item]]:
        place = 0
        for where, item in self._read(source):
            if isinstance(item, Broken):
                if bad is not None:
                    bad.seen += 1
                    bad.add(where, item.reason)
                continue
            if chosen[place]:
                yield where, item
            place += 1

    def _look(self, split: str, bad: BadRecords) -> list[array[int]]:
        """The digest of each item that can be used, by source."""
        found = []
        for source in self._sources[split]:
            digests = array("Q")
            for where, item in self._read(source):
                bad.seen += 1
                if isinstance(item, Broken):
                    bad.add(where, item.reason)
                else:
                    digests.append(_digest(item))
            found.append(digests)
        return found

    def _divide(self, fractions: tuple[float, float], unit: str, may_be_few: bool) -> bytearray:
        """Which split each item of the training's sources is in, one after another."""
        is_enough = self.count > sum(map(bool, fractions))
        if is_enough:
            return shares(self.count, *fractions)
        if may_be_few or not self.count:
            return bytearray(self.count)
        have = f"a single {unit}" if self.count == 1 else f"{self.count} {unit}s"
        raise UserError(
            f"data={self._section.label} ({source_name(self._section)}) is {have}, of which none can be held out: "
            "give more, or name data.validation_path"
        )

    def _digests_of(self, split: str) -> set[int]:
        if self._sources[split]:
            return {digest for digests in self._digests[split] for digest in digests}
        wanted = VALIDATION if split == "validation" else TEST
        every = (digest for digests in self._digests["train"] for digest in digests)
        return {digest for share, digest in zip(self._shares, every, strict=True) if share == wanted}


def _drawn(chosen: bytearray, count: int, seed: str) -> bytearray:
    """``count`` of what is chosen, drawn by ``seed``, each set of that size as likely as any other."""
    draw, left = random.Random(seed), sum(chosen)
    drawn = bytearray(len(chosen))
    for place, is_chosen in enumerate(chosen):
        if is_chosen:
            if draw.random() * left < count:
                drawn[place] = 1
                count -= 1
            left -= 1
    return drawn


def _digest(item: object) -> int:
    text = item if isinstance(item, str) else json.dumps(item, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def source_name(section: DataConfig) -> str:
    """Where the data come from, in a few words for messages."""
    return str(section.path or section.name or "packaged")


def _files(section: DataConfig, named: object, key: str) -> list[Source]:
    return [
        FileSource(file, weight)
        for path, weight in weights_of(named).items()
        for file in find_files(path, _suffixes(section), key)[0]
    ]


@functools.lru_cache(maxsize=1024)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    """Once a process, as fingerprint and origin both ask."""
    del mtime_ns, size
    return file_sha256(path)


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
