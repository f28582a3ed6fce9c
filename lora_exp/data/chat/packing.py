"""Several conversations in one row, which do not see each other: positions begin anew with each.

transformers makes a block-diagonal causal mask of such positions, for layers with a sliding window too, as long as it
is given no mask and keeps no cache: a mask of two dimensions, or ``use_cache``, would silently let a conversation see
those before it. ``packing_check`` asks each model.

Letters: T positions of a row.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from lora_exp.training.objectives import IGNORED

Row = dict[str, Tensor]
PADDING = 0  # a token like any other: nothing is predicted from it, and nothing sees it


def best_fit(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices into ``lengths`` in groups of up to ``size`` together: longest first, each where it fits most tightly."""
    groups: list[list[int]] = []
    with_room: dict[int, list[int]] = {}  # room left -> groups
    rooms: list[int] = []  # those with a group, ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect.bisect_left(rooms, length)
        if place == len(rooms):
            groups.append([])
            group, room = len(groups) - 1, size
        else:
            room = rooms[place]
            group = with_room[room].pop()
            if not with_room[room]:
                rooms.pop(place)
        groups[group].append(index)
        left = room - length
        if not with_room.setdefault(left, []):
            bisect.insort(rooms, left)
        with_room[left].append(group)
    return groups


class Packed(Dataset[Row]):
    """``rows`` of up to T tokens, as many a row of exactly T as fit: ``input_ids``, ``labels``, ``position_ids``."""

    def __init__(self, rows: Dataset[Row], lengths: Sequence[int], size: int) -> None:
        self._rows, self._size = rows, size
        self._groups = best_fit(lengths, size)
        self.filled = sum(lengths) / max(1, len(self._groups) * size)

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, index: int) -> Row:
        return pack([self._rows[each] for each in self._groups[index]], self._size)


def pack(rows: Sequence[Row], size: int) -> Row:
    """One row of ``size`` tokens. The first token of each is not predicted, least of all from the one before it."""
    packed = {
        "input_ids": torch.full((size,), PADDING),
        "labels": torch.full((size,), IGNORED),
        "position_ids": torch.zeros(size, dtype=torch.long),
    }
    start = 0
    for row in rows:
        end = start + len(row["input_ids"])
        packed["input_ids"][start:end] = row["input_ids"]
        packed["labels"][start + 1 : end] = row["labels"][1:]
        packed["position_ids"][start:end] = torch.arange(end - start)
        start = end
    packed["position_ids"][start:] = torch.arange(size - start)
    return packed


def row_of(ids: Sequence[int]) -> Row:
    """Tokens as a row of which all are learnt."""
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)}


def pad(rows: Sequence[Row]) -> Row:
    """Rows as one batch, as long as the longest. What stands behind a causal model's token is not seen by it."""
    longest = max(len(row["input_ids"]) for row in rows)
    return {name: torch.stack([_padded(row[name], longest, name) for row in rows]) for name in rows[0]}


def join(batches: Sequence[Mapping[str, Tensor]]) -> Row:
    """Batches (B, T) one below another, as long as the longest."""
    longest = max(batch["input_ids"].shape[1] for batch in batches)
    return {name: torch.cat([_padded(batch[name], longest, name) for batch in batches]) for name in batches[0]}


def _padded(values: Tensor, size: int, name: str) -> Tensor:
    missing = size - values.shape[-1]
    if not missing:
        return values
    return torch.nn.functional.pad(values, (0, missing), value=IGNORED if name == "labels" else PADDING)
