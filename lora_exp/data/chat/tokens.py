"""Texts as tokens, each known to be learnt or not, in one table on disk.

Letters: N tokens of all rows, R rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import Dataset

from lora_exp.data.chat.layouts import Laid
from lora_exp.errors import UserError
from lora_exp.training.objectives import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 512  # texts for the tokenizer, which works on several at a time


@dataclass(frozen=True)
class Tokens:
    """A text's tokens (T,), and which of them are learnt (T,)."""

    ids: np.ndarray
    learnt: np.ndarray


@dataclass
class Counts:
    """What became of a split's conversations."""

    rows: int = 0
    truncated: int = 0
    unlearnt: int = 0
    split: int = 0


@dataclass(frozen=True)
class Conversations(Dataset[dict[str, Tensor]]):
    """``ids``, ``learnt`` (N,), a row after the other; ``starts`` (R + 1,). A row: ``input_ids``, ``labels`` (T,)."""

    ids: Tensor
    learnt: Tensor
    starts: Tensor

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        here = slice(int(self.starts[index]), int(self.starts[index + 1]))
        ids = self.ids[here].long()
        return {"input_ids": ids, "labels": ids.masked_fill(~self.learnt[here], IGNORED)}

    @property
    def lengths(self) -> list[int]:
        lengths: list[int] = self.starts.diff().tolist()
        return lengths

    @classmethod
    def read(cls, file: Path) -> Conversations:
        return cls(**load_file(file))


def tokenise(laid: Iterable[Laid], tokenizer: PreTrainedTokenizerBase, learn_all: bool) -> Iterator[Tokens]:
    """Each text's tokens. Learnt is a token that holds a character of an answer; with ``learn_all`` every one.

    Raises UserError for a tokenizer that does not tell where its tokens lie.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"{type(tokenizer).__name__} does not tell where its tokens lie in a text, so that answers cannot be told "
            "from questions: use a model with a fast tokenizer (a tokenizer.json)"
        )
    texts = iter(laid)
    while batch := list(itertools.islice(texts, _AT_ONCE)):
        asked = [each.text for each in batch]
        found = tokenizer(asked, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        for each, ids, offsets in zip(batch, found["input_ids"], found["offset_mapping"], strict=True):
            learnt = np.ones(len(ids), bool) if learn_all else _inside(offsets, each.answers)
            yield Tokens(np.array(ids, np.int32), learnt)


def _inside(offsets: list[tuple[int, int]], answers: list[tuple[int, int]]) -> np.ndarray:
    """(T,) whether a token overlaps an answer; where its offsets were trimmed to nothing, whether it lies in one."""
    places = np.array(offsets, np.int64).reshape(-1, 2)
    starts, ends = places[:, 0], np.maximum(places[:, 1], places[:, 0] + 1)
    inside = np.zeros(len(places), bool)
    for start, end in answers:
        inside |= (starts < end) & (ends > start)
    return inside


@dataclass
class Writer:
    """Gathers rows of up to ``most`` tokens for a table."""

    most: int
    counts: Counts = field(default_factory=Counts)
    _ids: list[np.ndarray] = field(default_factory=list)
    _learnt: list[np.ndarray] = field(default_factory=list)

    def add(self, tokens: Tokens) -> bool:
        """Take a row, cut at ``most``; whether a token of it is learnt. The first never is: nothing is before it."""
        ids, learnt = tokens.ids[: self.most], tokens.learnt[: self.most]
        self.counts.truncated += len(tokens.ids) > self.most
        if not learnt[1:].any():
            self.counts.unlearnt += 1
            return False
        self.counts.rows += 1
        self._ids.append(ids)
        self._learnt.append(learnt)
        return True

    def write(self, file: Path) -> None:
        starts = np.cumsum([0, *(len(ids) for ids in self._ids)], dtype=np.int64)
        ids = np.concatenate(self._ids or [np.zeros(0, np.int32)])
        learnt = np.concatenate(self._learnt or [np.zeros(0, bool)])
        save_file({"ids": ids, "learnt": learnt, "starts": starts}, file)


def as_learnt(row: dict[str, Tensor]) -> list[tuple[list[int], bool]]:
    """A row's tokens in stretches that are learnt, or not."""
    pairs = zip(row["input_ids"].tolist(), (row["labels"] != IGNORED).tolist(), strict=True)
    return [([token for token, _ in run], learnt) for learnt, run in itertools.groupby(pairs, key=lambda pair: pair[1])]
