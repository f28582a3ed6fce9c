"""The texts of each split: documents out of records, and text files, in pieces that are small enough to tokenise."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.data.broken import BadRecords, Broken
from lora_exp.data.records import group_problem, text_problem
from lora_exp.data.sources import Items, Record, Source, held_out_fractions, sources_of, unread_files
from lora_exp.data.split import SPLITS
from lora_exp.data.text_files import Stretch, divided, length_of, pieces, repeated
from lora_exp.inputs import TEXT_SUFFIXES

if TYPE_CHECKING:
    from lora_exp.data.kinds.text import Text

Pieces = Iterator[tuple[str, bool]]


class Texts:
    """What each split reads: ``of(split)``. All sources are looked through first, and ``bad`` gets what is broken.

    Raises UserError for sources that cannot be had, for more broken records than may be, and for too few documents.
    """

    def __init__(self, section: Text, bad: BadRecords) -> None:
        self._section, self._bad = section, bad
        sources = {split: sources_of(section, split) for split in SPLITS}
        self.said = unread_files(section)
        self.splits = [split for split in SPLITS if split != "test" or sources["test"] or section.test_fraction]
        self._stretches = self._stretches_of(sources)
        rest = {split: [source for source in found if not _is_text(source)] for split, found in sources.items()}
        # Beside a text file, of which a part is held out, a document may be the only one.
        fractions = held_out_fractions(section, sources)
        has_text = any(map(_is_text, sources["train"]))
        read = lambda source: documents(source, section)  # noqa: E731
        self._documents = Items(section, rest, read, fractions, "document", may_be_few=has_text)

    def of(self, split: str) -> Pieces:
        """The split's texts in pieces, each with whether a document ends there."""
        for stretch in self._stretches[split]:
            yield from _marked(stretch.pieces())
        for _, document in self._documents.of(split, self._bad):
            yield from _marked(pieces(iter([document])))

    def _stretches_of(self, sources: dict[str, list[Source]]) -> dict[str, list[Stretch]]:
        texts = {split: list(filter(_is_text, found)) for split, found in sources.items()}
        lengths = {source.name: length_of(Path(source.name), self._bad) for each in texts.values() for source in each}
        self._bad.check()
        found = {
            split: [Stretch(Path(source.name), 0, lengths[source.name]) for source in texts[split]] for split in SPLITS
        }
        found["train"] = []
        for number, source in enumerate(texts["train"]):
            fractions = held_out_fractions(self._section, sources)
            parts = divided(Path(source.name), lengths[source.name], *fractions)
            found["train"] += repeated(parts["train"], source.weight, f"{self._section.sample_seed} {number}")
            for split in SPLITS[1:]:
                found[split].append(parts[split])
        return found


def documents(source: Source, section: Text) -> Iterator[tuple[str, str | Broken]]:
    """The ``text_field`` of each record, or, with ``group_by``, of neighbouring ones that share those fields.

    Of a group, the place is its first record's; what cannot be used comes with the reason.
    """
    shared: tuple[object, ...] = ()
    first, texts = "", list[str]()
    for where, record in source.read():
        reason = record.reason if isinstance(record, Broken) else _problem(record, section)
        if reason is not None or isinstance(record, Broken):
            yield where, Broken(str(reason))
            continue
        text, key = str(record[section.text_field]), tuple(record[name] for name in section.group_by)
        if not section.group_by:
            yield where, text
            continue
        if texts and key != shared:
            yield first, _group(shared, texts)
            texts = []
        first, shared = (first if texts else where), key
        texts.append(text)
    if texts:
        yield first, _group(shared, texts)


def _group(shared: tuple[object, ...], texts: list[str]) -> str:
    return "\n".join([" ".join(map(str, shared)), *texts])


def _problem(record: Record, section: Text) -> str | None:
    reason = text_problem(record, section.text_field, "data.text_field")
    return reason or next((found for name in section.group_by if (found := group_problem(record, name))), None)


def _marked(pieces: Iterator[str]) -> Pieces:
    """Each piece of a text with whether it is the last; nothing of a text that is blank."""
    piece = next(pieces, "")
    following = next(pieces, None)
    if following is None and not piece.strip():
        return
    while following is not None:
        yield piece, False
        piece, following = following, next(pieces, None)
    yield piece, True


def _is_text(source: Source) -> bool:
    return Path(source.name).suffix.lower() in TEXT_SUFFIXES
