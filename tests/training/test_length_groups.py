"""Rows that know their lengths: a batch has those about as long, and every epoch all of them."""

from __future__ import annotations

import itertools
import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_exp.training.batches import LengthGrouped, training_batches


class Lengthy(Dataset[dict[str, Tensor]]):
    def __init__(self, count: int) -> None:
        draw = random.Random(0)
        self.lengths = [draw.randint(1, 500) for _ in range(count)]

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"labels": torch.tensor([index])}


def epoch(rows: Lengthy, seed: int = 0, size: int = 4) -> list[int]:
    return list(LengthGrouped(rows.lengths, size, torch.Generator().manual_seed(seed)))


def test_an_epoch_has_every_row_once_and_its_last_batch_alone_is_smaller() -> None:
    for count in (1, 4, 203, 400):
        assert sorted(epoch(Lengthy(count))) == list(range(count))


def test_rows_of_a_batch_are_about_as_long() -> None:
    rows = Lengthy(400)

    def padding(order: list[int]) -> int:
        batches = [[rows.lengths[index] for index in order[start : start + 4]] for start in range(0, 400, 4)]
        return sum(max(batch) * len(batch) - sum(batch) for batch in batches)

    assert padding(epoch(rows)) < 0.05 * padding(list(range(400)))


def test_the_order_is_the_seeds_and_each_epochs_own() -> None:
    rows = Lengthy(203)
    assert epoch(rows, 1) == epoch(rows, 1)
    assert epoch(rows, 1) != epoch(rows, 2)
    lengths = [rows.lengths[index] for index in epoch(rows)]
    assert lengths != sorted(lengths, reverse=True)  # long batches do not all come first
    batches = training_batches(rows, 7, 0, False, lambda rows: {"labels": torch.cat([row["labels"] for row in rows])})
    first, second = ([batch["labels"].tolist() for batch in itertools.islice(batches, 29)] for _ in range(2))
    assert first != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert all(sorted(itertools.chain(*each)) == list(range(203)) for each in (first, second))
