"""Text files: how long they are, where they are cut into splits, and their text in pieces, never whole in memory."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lora_exp.data.broken import BadRecords
from lora_exp.data.formats import refuse_utf16
from lora_exp.data.split import SPLITS, near_break

PIECE = 2**17  # characters: longer texts are tokenised in pieces, cut between lines


@dataclass(frozen=True)
class Stretch:
    """The characters of ``file`` from ``start`` to ``end``, line ends being one character each."""

    file: Path
    start: int
    end: int

    def pieces(self) -> Iterator[str]:
        return pieces(_read(self.file, self.start, self.end))


def length_of(file: Path, bad: BadRecords) -> int:
    """How many characters a UTF-8 file has; a file of other bytes goes to ``bad``, and has none.

    Raises UserError for UTF-16.
    """
    refuse_utf16(file)
    bad.seen += 1
    try:
        return sum(map(len, _read(file, 0, None)))
    except UnicodeDecodeError:
        try:
            file.read_bytes().decode("utf-8")  # whole, as only then the place in the error is the file's
        except UnicodeDecodeError as error:
            bad.add(str(file), f"not UTF-8 text ({error.reason} at byte {error.start}): convert it first")
        return 0


def divided(file: Path, length: int, validation: float, test: float) -> dict[str, Stretch]:
    """A text's splits: its last part is the test's, what is before that the validation's."""
    ends = [_cut(file, length, validation + test), _cut(file, length, test), length]
    starts = [0, *ends]
    return {split: Stretch(file, start, end) for split, start, end in zip(SPLITS, starts, ends, strict=False)}


def repeated(stretch: Stretch, weight: float, seed: str) -> list[Stretch]:
    """A text ``weight`` times; of a fraction a part that begins where ``seed`` says."""
    length = stretch.end - stretch.start
    part = round((weight - int(weight)) * length)
    start = stretch.start + int(random.Random(seed).random() * (length - part + 1))
    drawn = [Stretch(stretch.file, start, start + part)] if part else []
    return [*itertools.repeat(stretch, int(weight)), *drawn]


def pieces(texts: Iterator[str]) -> Iterator[str]:
    """A text that comes in parts, in pieces of at most PIECE characters.

    It is cut between a line and the next that does not begin with a space: there, tokenizers that split text into
    words first have tokens end anyway.
    """
    held = ""
    for text in texts:
        held += text
        while len(held) > PIECE:
            place = _between_lines(held)
            yield held[:place]
            held = held[place:]
    if held:
        yield held


def _between_lines(text: str) -> int:
    place = PIECE
    while (place := text.rfind("\n", PIECE // 2, place)) > 0:
        if not text[place + 1].isspace() and not text[place - 1].isspace():
            return place + 1
    place = text.rfind(" ", PIECE // 2, PIECE)
    return place if place > 0 else PIECE


def _read(file: Path, start: int, end: int | None) -> Iterator[str]:
    at = 0
    with file.open(encoding="utf-8-sig") as stream:  # turns each kind of line end into \n
        while text := stream.read(PIECE if end is None else min(PIECE, end - at)):
            at += len(text)
            if at > start:
                yield text[max(0, start - (at - len(text))) :]


def _cut(file: Path, length: int, fraction: float) -> int:
    """As ``split.cut`` of the whole text, of which only what is near the place is read."""
    position = length - round(length * fraction)
    within = int(0.1 * min(position, length - position)) + 2
    start = max(0, position - within)
    window = "".join(_read(file, start, min(length, position + within)))
    return start + near_break(window, position - start, 0.1 * min(position, length - position))
