"""Texts and their classes for classifiers: read, split by class, tokenised, filled up to the longest of a batch.

Letters: N rows, B of a batch, T tokens of the longest of a batch, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_exp.config import DataConfig
from lora_exp.data.broken import BadRecords, Broken
from lora_exp.data.class_folders import ordered_classes, sources_of_classes
from lora_exp.data.formats import Record
from lora_exp.data.kind import Batch, Data, Row
from lora_exp.data.rows import tokenizer_identity
from lora_exp.data.sources import Items, Source, fingerprint, held_out_fractions
from lora_exp.data.split import SPLITS
from lora_exp.data.values import in_words
from lora_exp.errors import UserError
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import RowLosses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.data.kinds.text_classification import TextClassification

# Raised when rows made by an older version of this file would differ.
_FORMAT = 1
_SHOWN = 300  # characters of the example
Example = tuple[tuple[str, ...], str]  # one text, or two that belong together, and the name of its class


@dataclass(frozen=True)
class Texts(Dataset[Row]):
    """N rows of their own lengths: ``input_ids``, ``labels`` (a class), ``padding`` (the token that fills up)."""

    tokens: list[dict[str, Tensor]]
    labels: list[int]
    padding: int

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Row:
        widened = {name: values.long() for name, values in self.tokens[index].items()}
        return {**widened, "labels": torch.tensor(self.labels[index]), "padding": torch.tensor(self.padding)}

    @property
    def lengths(self) -> list[int]:
        """How many tokens each row has."""
        return [len(row["input_ids"]) for row in self.tokens]


def load_texts(section: TextClassification, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read, split and tokenise.

    Raises UserError for texts that cannot be had, too many bad ones, or less than two classes.
    """
    _check_length(section, tokenizer)
    splits, bad = examples(section)
    classes = class_names(splits, section)
    padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    indices, rows, said = {name: index for index, name in enumerate(classes)}, {}, bad.said()
    for split, found in splits.items():
        tokens, cut = _tokenise([texts for texts, _ in found], section, tokenizer)
        rows[split] = Texts(tokens, [indices[label] for _, label in found], padding)
        if cut:
            longest = section.max_length - len(section.ending(tokenizer)[0])
            said.append(f"{cut:,} of {len(found):,} {split} texts are cut to their first {longest} tokens")
    return Data(
        train=rows["train"],
        validation=rows["validation"],
        rows=f"texts of {len(classes)} classes",
        shape={"class_names": classes, "max_length": section.max_length, "pad_token_id": padding},
        test=rows["test"] if len(rows["test"]) else None,
        fingerprint=fingerprint(section, _FORMAT, tokenizer_identity(tokenizer), find=_sources),
        said=[*said, *_missing_classes(splits, classes)],
        example=_shown(rows["train"], classes, tokenizer),
    )


def examples(section: TextClassification) -> tuple[dict[str, list[Example]], BadRecords]:
    """The texts and classes of every split, and what could not be used.

    Folders of classes are held out in equal shares, as are records that are in order of their classes. Raises
    UserError for sources that cannot be had, or of which more than ``data.max_bad_fraction`` cannot be used.
    """
    bad = BadRecords(section.max_bad_fraction)

    def read(source: Source) -> Iterator[tuple[str, Example | Broken]]:
        for where, record in source.read():
            yield where, record if isinstance(record, Broken) else _example(record, section)

    sources = {split: _sources(section, split) for split in SPLITS}
    items = Items(section, sources, read, held_out_fractions(section, sources), "text")
    return {split: [example for _, example in items.of(split, bad)] for split in SPLITS}, bad


def class_names(splits: Mapping[str, list[Example]], section: TextClassification) -> tuple[str, ...]:
    """The classes of all splits, in order."""
    names = {label for found in splits.values() for _, label in found}
    if len(names) < 2:
        raise UserError(
            f"data={section.label} has texts of {len(names)} classes ({', '.join(names) or 'none'}): give texts of two "
            "at least, or set data.label_field"
        )
    return ordered_classes(names)


def collate_texts(rows: list[Row]) -> Batch:
    """Rows → ``input_ids``, ``attention_mask`` and whatever else the tokenizer gives, (B, T), and ``labels`` (B,)."""
    sizes = torch.tensor([len(row["input_ids"]) for row in rows])
    longest = max(len(row["input_ids"]) for row in rows)
    is_token = torch.arange(longest) < sizes[:, None]
    batch = {name: _filled(rows, name, longest) for name in rows[0] if name not in ("labels", "padding")}
    padding = torch.stack([row["padding"] for row in rows])[:, None]
    batch["input_ids"] = torch.where(is_token, batch["input_ids"], padding)
    labels = torch.stack([row["labels"] for row in rows])
    return {**batch, "attention_mask": is_token.long(), "labels": labels}


def text_losses(model: nn.Module, batch: Batch) -> RowLosses:
    """Cross-entropy of each text against its class."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    return class_losses(model(**inputs).logits, batch["labels"])


def _filled(rows: list[Row], name: str, longest: int) -> Tensor:
    return torch.stack([F.pad(row[name], (0, longest - len(row[name]))) for row in rows])


def _sources(section: DataConfig, split: str) -> list[Source]:
    assert hasattr(section, "text_field")
    assert hasattr(section, "label_field")
    text_field = str(section.text_field)

    def read_one(file: Path) -> Record | Broken:
        try:
            return {text_field: file.read_bytes().decode("utf-8-sig")}
        except UnicodeDecodeError as error:
            return Broken(f"it is not UTF-8 text ({error.reason} at byte {error.start})")

    return sources_of_classes(section, split, str(section.label_field), read_one)


def _example(record: Record, section: TextClassification) -> Example | Broken:
    fields = [section.text_field] + ([section.pair_field] if section.pair_field else [])
    for name in (*fields, section.label_field):
        if name not in record:
            return Broken(f"it lacks {name} (it has {', '.join(map(str, list(record)[:20])) or 'nothing'})")
    for name in fields:
        text = record[name]
        if not isinstance(text, str):
            return Broken(f"{name} is {in_words(text)}, and must be text")
        if not text.strip():
            return Broken(f"{name} is empty")
    label = record[section.label_field]
    if not isinstance(label, (str, int)) or not str(label).strip():
        return Broken(f"{section.label_field} is {in_words(label)}, and must be a name or a whole number")
    return tuple(str(record[name]).strip() for name in fields), str(label).strip()


def _missing_classes(splits: Mapping[str, list[Example]], classes: Sequence[str]) -> list[str]:
    missing = sorted(set(classes) - {label for _, label in splits["train"]})
    return [f"no text of {', '.join(missing)} is trained on: it is held out alone"] if missing else []


def _shown(rows: Texts, classes: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> str:
    """The first row, dimmed as nothing of it is predicted, and its class."""
    if not len(rows):
        return ""
    text = " ".join(str(tokenizer.decode(rows.tokens[0]["input_ids"])).split())
    return f"\x1b[2m{text[:_SHOWN]}{'…' * (len(text) > _SHOWN)}\x1b[0m → {classes[rows.labels[0]]}"


def ending(suffix: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], int]:
    """The suffix's tokens, and how many special tokens the tokenizer puts after a text."""
    bare = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    if not bare:
        return [], 0
    whole = tokenizer(suffix)["input_ids"]
    before = next(place for place in range(len(whole)) if whole[place : place + len(bare)] == bare)
    return bare, len(whole) - before - len(bare)


def _check_length(section: TextClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=section.pair_field is not None)
    suffix, _ = section.ending(tokenizer)
    if section.max_length <= special + len(suffix):
        more = f" and {len(suffix)} of data.suffix" if suffix else ""
        raise UserError(
            f"data.max_length={section.max_length} leaves no room beside {special} special tokens{more}: raise it"
        )


def _tokenise(
    texts: list[tuple[str, ...]], section: TextClassification, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Tensor]], int]:
    """Each text's tokens, and how many texts were cut."""
    if not texts:
        return [], 0
    suffix, after = section.ending(tokenizer)
    longest = section.max_length - len(suffix)
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, return_attention_mask=False)
    over = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > longest]
    rows = [{name: whole[name][i] for name in whole} for i in range(len(texts))]
    if over:
        long = [[column[index] for index in over] for column in columns]
        cut = tokenizer(*long, truncation=True, max_length=longest, return_attention_mask=False)
        for place, index in enumerate(over):
            rows[index] = {name: cut[name][place] for name in cut}
    ended = [_ended(row, suffix, after) for row in rows]
    return [{name: torch.tensor(ids, dtype=torch.int32) for name, ids in row.items()} for row in ended], len(over)


def _ended(row: dict[str, list[int]], suffix: list[int], after: int) -> dict[str, list[int]]:
    """With the suffix before the special tokens at the end; what else a token has is the token's before it."""
    end = len(row["input_ids"]) - after
    more = {name: suffix if name == "input_ids" else ids[end - 1 : end] * len(suffix) for name, ids in row.items()}
    return {name: [*ids[:end], *more[name], *ids[end:]] for name, ids in row.items()}
