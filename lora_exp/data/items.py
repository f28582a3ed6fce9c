"""Items of sources, divided among the splits: counted, compared, and repeated by weight."""

from __future__ import annotations

import hashlib
import json
import random
from array import array
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, Protocol, TypeVar

from lora_exp.config import DataConfig
from lora_exp.data.broken import BadRecords, Broken
from lora_exp.data.formats import Read
from lora_exp.data.split import SPLITS, TEST, VALIDATION, shares
from lora_exp.errors import UserError

_Item = TypeVar("_Item")


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
        source = self._section.path or self._section.name or "packaged"
        raise UserError(
            f"data={self._section.label} ({source}) is {have}, of which none can be held out: "
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
