"""Micro batches in an order that a seed fixes, and that can be gone on with where it was left."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler, Subset

from lora_exp.config import TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.objectives import Batch
from lora_exp.training.timetable import Timetable, micro_batches_of

Rows = Dataset[dict[str, Tensor]]
_POOLED = 50  # batches whose rows are sorted together: fewer would pad more, more would repeat the same company
Collate = Callable[[list[dict[str, Tensor]]], Batch]


def check_rows(rows: Rows, size: int, processes: int = 1) -> None:
    """Raise UserError if ``rows`` do not fill a micro batch a process. Asked before a base is loaded for them."""
    have = len(rows)  # type: ignore[arg-type]
    if size * processes > have >= size:
        raise UserError(
            f"{processes} processes with train.micro_batch_size={size} are too many for {have} training rows: "
            "start fewer, or lower it"
        )
    if size > have:
        raise UserError(
            f"train.micro_batch_size={size} is more than the {have} training rows: "
            "lower it, or give more data (of a text, shorter blocks make more: data.block_size)"
        )


def check_evaluation(rows: Rows) -> None:
    """Raise UserError if there is nothing to evaluate on: a mean of nothing compares with nothing."""
    if not len(rows):  # type: ignore[arg-type]
        raise UserError("No row is held out for validation: raise data.val_fraction, or give more data")


def timetable_of(rows: Rows, section: TrainConfig, processes: int = 1) -> Timetable:
    """When a training on ``rows`` does what, by the micro batches of all processes. Streamed rows have no number."""
    have = len(rows) if hasattr(rows, "__len__") else None
    known = None if have is None else micro_batches_of(have, section.micro_batch_size, section.drop_last)
    return Timetable.of(replace(section, grad_accum_steps=section.grad_accum_steps * processes), known)


class TrainingBatches(Iterator[Batch]):
    """Micro batches of ``size`` rows for ever, each epoch in a new order drawn from ``seed``.

    An epoch's last one holds the rows that are left, or with ``drop_last`` is left out if they are fewer. Of several
    ``processes`` that of ``rank`` takes every so-manieth of an epoch, and reads no rows of the others'.

    ``state_dict`` tells the place between two batches; after ``load_state_dict`` the same batches follow. It draws from
    the global generator, as every new epoch does (torch's DataLoader): load that generator's state after it.
    """

    def __init__(
        self, rows: Rows, size: int, seed: int, pin: bool, collate: Collate,
        drop_last: bool = False, rank: int = 0, processes: int = 1,
    ) -> None:  # fmt: skip
        check_rows(rows, size, processes)
        self._rows, self._pin, self._collate = rows, pin, collate
        self._rank, self._processes = rank, processes
        self._generator = torch.Generator().manual_seed(seed)
        self._sampler = BatchSampler(training_order(rows, size, self._generator), size, drop_last)
        self._epoch, self._batch = -1, 0
        self._at_epochs_start = self._generator.get_state()
        self._loaded: Iterator[Batch] = iter(())

    def __next__(self) -> Batch:
        batch = next(self._loaded, None)
        if batch is None:
            self._epoch, self._batch = self._epoch + 1, 0
            self._begin_epoch()
            batch = next(self._loaded)
        self._batch += 1
        return batch

    def state_dict(self) -> dict[str, object]:
        """``epoch`` counts from 0 (-1: not begun), ``batch`` those drawn of it; ``generator`` as at its start."""
        return {"epoch": self._epoch, "batch": self._batch, "generator": self._at_epochs_start}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        generator, batch, epoch = state["generator"], state["batch"], state["epoch"]
        assert isinstance(generator, Tensor)
        assert isinstance(batch, int)
        assert isinstance(epoch, int)
        self._generator.set_state(generator)
        self._at_epochs_start = generator
        self._epoch, self._batch = epoch, batch
        if epoch >= 0:
            self._begin_epoch()

    def _begin_epoch(self) -> None:
        """From this process's batch number ``_batch`` on. Rows before that are not read."""
        self._at_epochs_start = self._generator.get_state()
        own = list(self._sampler)[self._rank :: self._processes]
        left = own[self._batch :]
        self._loaded = iter(DataLoader(self._rows, batch_sampler=left, collate_fn=self._collate, pin_memory=self._pin))


def training_batches(
    rows: Rows, size: int, seed: int, pin: bool, collate: Collate,
    drop_last: bool = False, rank: int = 0, processes: int = 1,
) -> TrainingBatches:  # fmt: skip
    """See ``TrainingBatches``."""
    return TrainingBatches(rows, size, seed, pin, collate, drop_last, rank, processes)


def training_order(rows: Rows, size: int, generator: torch.Generator) -> Sampler[int]:
    """A new order of all rows an epoch; of rows that know their ``lengths``, those of a batch are about as long."""
    lengths = getattr(rows, "lengths", None)
    if lengths is None:
        return RandomSampler(rows, generator=generator)  # type: ignore[arg-type]
    return LengthGrouped(lengths, size, generator)


class LengthGrouped(Sampler[int]):
    """Batches of ``size`` rows of about the same length, in a random order; which meet is drawn anew each epoch."""

    def __init__(self, lengths: Sequence[int], size: int, generator: torch.Generator) -> None:
        self._lengths, self._size, self._generator = lengths, size, generator

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        drawn = torch.randperm(len(self), generator=self._generator).tolist()
        pool = self._size * _POOLED
        pools = (drawn[start : start + pool] for start in range(0, len(drawn), pool))
        ordered = [index for each in pools for index in sorted(each, key=lambda index: -self._lengths[index])]
        batches = [ordered[start : start + self._size] for start in range(0, len(ordered), self._size)]
        whole = [batch for batch in batches if len(batch) == self._size]
        last = [batch for batch in batches if len(batch) < self._size]
        order = torch.randperm(len(whole), generator=self._generator).tolist()
        yield from (index for batch in [*(whole[place] for place in order), *last] for index in batch)


def evaluation_batches(rows: Rows, size: int, most: int, pin: bool, collate: Collate) -> list[Batch]:
    """Up to ``most`` rows, evenly spread over ``rows`` and always the same ones, as micro batches."""
    check_evaluation(rows)
    have = len(rows)  # type: ignore[arg-type]
    count = min(most, have)
    spread = Subset(rows, [index * have // count for index in range(count)])
    return list(DataLoader(spread, batch_size=size, collate_fn=collate, pin_memory=pin))
