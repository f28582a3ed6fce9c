"""Micro batches in an order that a seed fixes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, Subset

from lora_exp.training.objectives import Batch, collate_blocks


def training_batches(rows: Dataset, size: int, seed: int, pin: bool) -> Iterator[Batch]:
    """Micro batches of ``size`` rows for ever, each epoch in a new order drawn from ``seed``."""
    if size > len(rows):  # type: ignore[arg-type]
        raise ValueError(
            f"train.micro_batch_size={size} is more than the {len(rows)} training blocks: "  # type: ignore[arg-type]
            "lower it, lower data.block_size, or give more text"
        )
    order = RandomSampler(rows, generator=torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    loader = DataLoader(rows, batch_size=size, sampler=order, collate_fn=collate_blocks, drop_last=True, pin_memory=pin)
    while True:
        yield from loader


def evaluation_batches(rows: Dataset, size: int, most: int, pin: bool) -> list[Batch]:
    """Up to ``most`` rows, evenly spread over ``rows`` and always the same ones, as micro batches."""
    have = len(rows)  # type: ignore[arg-type]
    count = min(most, have)
    spread = Subset(rows, [index * have // count for index in range(count)])
    return list(DataLoader(spread, batch_size=size, collate_fn=collate_blocks, pin_memory=pin))
