"""Micro batches: what cannot fill one is refused, and an order that was left is gone on with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, default_collate

from lora_exp.training.batches import TrainingBatches, evaluation_batches, training_batches
from lora_exp.training.nested import joined, parted


def rows(count: int) -> Any:
    return [{"input_ids": torch.full((4,), index)} for index in range(count)]


def batches(count: int, size: int, **how: Any) -> TrainingBatches:
    return training_batches(rows(count), size, seed=3, pin=False, collate=default_collate, **how)


def drawn(given: Iterator[Any], most: int) -> list[list[int]]:
    return [batch["input_ids"][:, 0].tolist() for batch in itertools.islice(given, most)]


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


@pytest.mark.parametrize("drop_last", [True, False])
def test_the_order_and_the_global_generator_are_a_plain_data_loaders(drop_last: bool) -> None:
    """Torch's own, epoch after epoch."""
    order = RandomSampler(rows(7), generator=torch.Generator().manual_seed(3))
    loader = DataLoader(rows(7), batch_size=2, sampler=order, drop_last=drop_last)
    torch.manual_seed(0)
    theirs = drawn(itertools.chain.from_iterable(itertools.repeat(loader)), 11)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert drawn(batches(7, 2, drop_last=drop_last), 11) == theirs
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("left_at", range(10))
def test_what_was_left_is_gone_on_with(left_at: int, drop_last: bool, processes: int) -> None:
    """Also at an epoch's border and before the first batch, and by a state that went through a checkpoint's files."""
    for rank in range(processes):
        how = {"drop_last": drop_last, "rank": rank, "processes": processes}
        torch.manual_seed(0)
        whole = batches(7, 2, **how)
        drawn(whole, left_at)
        state, generator = joined(*parted(whole.state_dict())), torch.get_rng_state()
        rest, after = drawn(whole, 9), torch.get_rng_state()
        resumed = batches(7, 2, **how)
        resumed.load_state_dict(state)
        torch.set_rng_state(generator)
        assert drawn(resumed, 9) == rest
        assert torch.equal(torch.get_rng_state(), after)


def test_rows_that_were_seen_are_not_read_again() -> None:
    class Watched(list[Any]):
        def __init__(self, given: Any) -> None:
            super().__init__(given)
            self.read: list[int] = []

        def __getitem__(self, index: Any) -> Any:
            self.read.append(index)
            return super().__getitem__(index)

    whole = batches(8, 2)
    drawn(whole, 3)
    seen = Watched(rows(8))
    resumed = training_batches(seen, 2, seed=3, pin=False, collate=default_collate)  # type: ignore[arg-type]
    resumed.load_state_dict(whole.state_dict())
    assert seen.read == []
    assert drawn(resumed, 1) == drawn(whole, 1)
    assert len(seen.read) == 2


def test_several_processes_share_an_order() -> None:
    parts = [drawn(batches(8, 2, rank=rank, processes=2), 6) for rank in (0, 1)]
    together = [batch for pair in zip(*parts, strict=True) for batch in pair]
    assert together == drawn(batches(8, 2), 12)


def test_too_few_rows_for_all_processes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 processes with train.micro_batch_size=2 are too many for 5 training rows"):
        batches(5, 2, processes=3)
