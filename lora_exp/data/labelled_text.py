"""Texts and their classes for classifiers: read, split by class, tokenised, filled up to the longest of a batch.

Letters: N rows, B of a batch, T tokens of the longest of a batch, K classes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from lora_exp.data.class_folders import class_folders, files_of
from lora_exp.data.kind import Batch, Data, Row
from lora_exp.data.sources import BadRecords, records
from lora_exp.data.split import held_out_by_class
from lora_exp.errors import UserError
from lora_exp.machine.packaged import find_packaged, install_line
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import RowLosses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.data.kinds.text_classification import TextClassification

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Example:
    """One text, or two that belong together, and the name of its class."""

    texts: tuple[str, ...]
    label: str


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
    """Read, split and tokenise. Of each class its share is held out.

    Raises UserError for texts that cannot be had, or of less than two classes.
    """
    found = examples(section)
    classes = class_names(found, section)
    _check_length(section, tokenizer)
    indices = {name: index for index, name in enumerate(classes)}
    labels = [indices[example.label] for example in found]
    padding = next((each for each in (tokenizer.pad_token_id, tokenizer.eos_token_id) if each is not None), 0)
    tokens, cut = _tokenise([example.texts for example in found], section.max_length, tokenizer)
    if cut:
        log.info(f"data   {cut:,} of {len(found):,} texts are cut to their first {section.max_length} tokens")
    train, validation = held_out_by_class(labels, section.val_fraction)

    def rows(chosen: Sequence[int]) -> Texts:
        return Texts([tokens[index] for index in chosen], [labels[index] for index in chosen], padding)

    return Data(
        train=rows(train),
        validation=rows(validation),
        rows=f"texts of {len(classes)} classes",
        shape={"class_names": classes, "max_length": section.max_length, "pad_token_id": padding},
    )


def examples(section: TextClassification) -> list[Example]:
    """Every record's text and class, each text once: held out it would else have been seen.

    Raises UserError for bad records, above ``data.max_bad_fraction`` of them.
    """
    bad, found, total, repeated = BadRecords(section.max_bad_fraction), {}, 0, 0
    for where, record in _records(section, bad):
        total += 1
        example = _example(record, section)
        if isinstance(example, str):
            bad.add(where, example)
        elif (known := found.get(example.texts)) is None:
            found[example.texts] = example
        elif known.label == example.label:
            repeated += 1
        else:
            bad.add(where, f"the same text is {known.label!r} elsewhere and {example.label!r} here")
    bad.check(total)
    if repeated:
        log.info(f"data   {repeated:,} of {total:,} texts are there before, word for word: they are left out")
    return list(found.values())


def class_names(found: list[Example], section: TextClassification) -> tuple[str, ...]:
    """The classes in order: of their numbers if they are numbers, else of their names."""
    names = {example.label for example in found}
    if len(names) < 2:
        raise UserError(
            f"data={section.label} has {len(found)} texts of {len(names)} classes "
            f"({', '.join(names) or 'none'}): give texts of two at least, or set data.label_field"
        )
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


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


def _records(section: TextClassification, bad: BadRecords) -> Iterator[tuple[str, dict[str, object]]]:
    folder = _folder(section)
    if folder is None:
        yield from records(section, "train", bad)
        return
    for each in class_folders(folder):
        for file in files_of(each):
            try:
                text = file.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                bad.add(str(file), f"it is not UTF-8 text ({error.reason} at byte {error.start})")
            else:
                yield str(file), {section.text_field: text, section.label_field: each.name}


def _folder(section: TextClassification) -> Path | None:
    """Where there is a folder a class; None if there are records to read."""
    if section.path:
        path = Path(section.path).expanduser()
        return path if class_folders(path) else None
    assert section.packaged is not None
    found = find_packaged(section.packaged)
    if found is None:
        raise UserError(
            f"data={section.label} is not installed: {install_line(section.packaged)}, "
            "or take your own texts by data=text_classification data.path=FILE_OR_FOLDER"
        )
    return found


def _example(record: dict[str, object], section: TextClassification) -> Example | str:
    """The record as an example, or what is wrong with it."""
    fields = [section.text_field] + ([section.pair_field] if section.pair_field else [])
    if missing := [name for name in (*fields, section.label_field) if record.get(name) is None]:
        return f"it lacks {missing[0]} (it has {', '.join(map(str, list(record)[:20])) or 'nothing'})"
    texts = [record[name] for name in fields]
    for name, text in zip(fields, texts, strict=True):
        if not isinstance(text, str):
            return f"{name} is {type(text).__name__}, and must be text"
        if not text.strip():
            return f"{name} is empty"
    label = record[section.label_field]
    if not isinstance(label, (str, int)) or not str(label).strip():
        return f"{section.label_field} is {label!r}, and must be a name or a number"
    return Example(tuple(str(text).strip() for text in texts), str(label).strip())


def _check_length(section: TextClassification, tokenizer: PreTrainedTokenizerBase) -> None:
    special = tokenizer.num_special_tokens_to_add(pair=section.pair_field is not None)
    if section.max_length <= special:
        raise UserError(
            f"data.max_length={section.max_length} leaves no room beside {special} special tokens: raise it"
        )


def _tokenise(
    texts: list[tuple[str, ...]], longest: int, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[dict[str, Tensor]], int]:
    """Each text's tokens, and how many texts were cut."""
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, return_attention_mask=False)
    over = [index for index, ids in enumerate(whole["input_ids"]) if len(ids) > longest]
    rows = [{name: torch.tensor(whole[name][i], dtype=torch.int32) for name in whole} for i in range(len(texts))]
    if over:
        long = [[column[index] for index in over] for column in columns]
        cut = tokenizer(*long, truncation=True, max_length=longest, return_attention_mask=False)
        for place, index in enumerate(over):
            rows[index] = {name: torch.tensor(cut[name][place], dtype=torch.int32) for name in cut}
    return rows, len(over)
