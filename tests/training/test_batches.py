"""Micro batches: what cannot fill one is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import default_collate

from lora_exp.training.batches import evaluation_batches, training_batches


def rows(count: int) -> Any:
    return [{"input_ids": torch.full((4,), index)} for index in range(count)]


@pytest.mark.parametrize("size", [3, 7])
def test_a_micro_batch_above_the_rows_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"train.micro_batch_size={size} is more than the 2 training rows"):
        next(training_batches(rows(2), size, seed=0, pin=False, collate=default_collate))


def test_an_evaluation_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"No row is held out for validation: raise data.val_fraction"):
        evaluation_batches(rows(0), 2, most=4, pin=False, collate=default_collate)


def test_an_evaluation_takes_rows_spread_evenly() -> None:
    batches = evaluation_batches(rows(10), 2, most=4, pin=False, collate=default_collate)
    assert [int(row[0]) for batch in batches for row in batch["input_ids"]] == [0, 2, 5, 7]
