"""The frozen layers below the lowest adapter: rows that several lanes have in common go through them once.

Lanes of one seed see the same rows, and below the first adapted layer these are the same for each. There every set of
rows goes through by itself, so that its last bits follow from no other lane's; the layers above see those of all.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lora_exp.adapters.joint import JointModel
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.machine.sharding import layer_list
from lora_exp.training.loop import Context
from lora_exp.training.objectives import Batch

log = logging.getLogger(__name__)
Join = Callable[[Sequence[Batch]], Batch]
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}  # of the largest value; 16 bits: what follows
_CLOSE_16 = 3e-2


@dataclass(frozen=True)
class _Rows:
    """Of one pass: where each set of rows stands first, and which set each lane has, in their order."""

    sets: list[slice]
    of_lanes: list[int]

    @property
    def count(self) -> int:
        return sum(self.sets[found].stop - self.sets[found].start for found in self.of_lanes)


class Stem:
    """Makes a joint model's lowest layers see every set of rows once. Whether it does is settled by the first pass, as
    with it the last bits of the lanes would change.

    A layer that cannot be called so ends it: one that fails on a part of its rows, or makes something else of them.
    ``level``: of the log lines that say what it does.
    """

    def __init__(self, joint: JointModel, level: int = logging.INFO) -> None:
        self._level = level
        self.is_used: bool | None = None
        self.spared = 0  # rows that a layer did not see again, summed over layers and passes
        self._layers = list(layer_list(joint.wrapped) or ())
        self._end = len(self._layers)  # the first layer that all rows go through
        self._rows: _Rows | None = None
        self._tried = set[int]()
        for place, layer in enumerate(self._layers):
            layer.forward = partial(self._forward, place, layer.forward)

    def joining(self, join: Join) -> Join:
        """``join``, which looks at whose rows are the same; for the next pass alone."""

        def look(batches: Sequence[Batch]) -> Batch:
            self._rows = self._chosen(_rows_of(batches))
            return join(batches)

        return look

    @contextmanager
    def passing(self, route: Context) -> Iterator[None]:
        """The pass for which the batches were joined."""
        try:
            with route:
                yield
        finally:
            self._rows = None

    def _chosen(self, rows: _Rows) -> _Rows | None:
        if self.is_used is None:
            self._end = _lowest_adapted(self._layers)
            self.is_used = self._end > 0 and len(rows.sets) < len(rows.of_lanes)
            if self.is_used:
                lowest = f"{self._end} of {len(self._layers)} layers"
                log.log(self._level, f"lanes  the same rows go once through the lowest {lowest}")
        elif self.is_used:
            self._end = min(self._end, _lowest_adapted(self._layers))
        return rows if self.is_used else None

    def _forward(self, place: int, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        rows = self._rows
        if rows is None or place >= self._end:
            return plain(*args, **kwargs)
        if place in self._tried:
            return self._by_sets(rows, plain, args, kwargs)
        whole = plain(*args, **kwargs)
        reason = self._why_not(rows, plain, args, kwargs, whole)
        if reason is None:
            self._tried.add(place)
            return self._by_sets(rows, plain, args, kwargs)
        log.log(self._level, f"lanes  from layer {place} on all rows go through every layer: {reason}")
        self._end = place
        return whole

    def _by_sets(self, rows: _Rows, plain: Callable[..., Any], args: Any, kwargs: Any) -> Tensor:
        found = []
        for here in rows.sets:
            mine, named = tree_map(partial(_part, here, rows.count), (args, kwargs))
            found.append(plain(*mine, **named))
        self.spared += rows.count - sum(len(out) for out in found)
        return torch.cat([found[each] for each in rows.of_lanes])

    def _why_not(self, rows: _Rows, plain: Callable[..., Any], args: Any, kwargs: Any, whole: Any) -> str | None:
        if not isinstance(whole, Tensor) or len(whole) != rows.count:
            return "it returns more than hidden states"
        if whole.requires_grad:
            return "something that is trained lies before it"
        try:
            found = self._by_sets(rows, plain, args, kwargs)
        except Exception as error:
            log.debug("a layer by sets of rows", exc_info=error)
            return f"it cannot be called with a part of the rows ({type(error).__name__})"
        most = _CLOSE.get(whole.dtype, _CLOSE_16) * float(whole.abs().max())
        return None if float((found - whole).abs().max()) <= most else "it makes something else of a part of the rows"


def _rows_of(batches: Sequence[Batch]) -> _Rows:
    kept: list[Batch] = []
    sets, of_lanes, begin = list[slice](), list[int](), 0
    for batch in batches:
        size = len(next(iter(batch.values())))
        same = next((number for number, other in enumerate(kept) if _are_equal(batch, other)), None)
        if same is None:
            same = len(kept)
            kept.append(batch)
            sets.append(slice(begin, begin + size))
        of_lanes.append(same)
        begin += size
    return _Rows(sets, of_lanes)


def _are_equal(one: Batch, other: Batch) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def depth(model: nn.Module) -> int:
    """How many of a transformer's layers lie below the first that has an adapter."""
    return _lowest_adapted(list(layer_list(model) or ()))


def _lowest_adapted(layers: Sequence[nn.Module]) -> int:
    found = (place for place, layer in enumerate(layers) if any(isinstance(m, LoRALayerBase) for m in layer.modules()))
    return next(found, len(layers))


def _part(here: slice, count: int, value: Any) -> Any:
    """What of an argument belongs to some rows: of a tensor with a row for each of ``count``, theirs. A vector is of
    positions."""
    is_by_row = isinstance(value, Tensor) and value.dim() > 1 and len(value) == count
    return value[here] if is_by_row else value
