"""A model looks at rows: one adapter after another, several in one pass over the base, or merged into it.

Letters: N rows, B of a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_exp.adapters import LoraModel
from lora_exp.adapters.routing.plan import BASE as ROUTED_BASE
from lora_exp.data import DataKind
from lora_exp.machine import signals
from lora_exp.progress import Steps
from lora_exp.training.metrics import RowLosses, Sums, merged
from lora_exp.training.objectives import Batch
from lora_exp.use.loading import BASE, Trained


@dataclass(frozen=True)
class Seen:
    """What one model found: sums over all rows, and each row's mean loss (N,) in nats a prediction."""

    sums: Sums
    losses: Tensor


@dataclass(frozen=True)
class Look:
    """``batches`` of a kind of data, to be looked at by a run's model and its base. ``bar`` moves once a batch."""

    trained: Trained
    kind: DataKind
    batches: Sequence[Batch]
    bar: Steps

    def alone(self, name: str) -> Seen:
        """By one adapter, or the base, in the very passes that a training evaluates by."""
        with self.trained.using(name):
            return _gathered(self._losses(batch) for batch in self._each())

    def together(self, names: Sequence[str]) -> Mapping[str, Seen]:
        """By several in one pass a batch, which is repeated for each of them. Raises UserError for a model that makes
        other batches inside, such as a mixture whose experts are layers of their own."""
        model, parts = self.trained.model, dict[str, list[RowLosses]]((name, []) for name in names)
        assert isinstance(model, LoraModel)
        for batch in self._each():
            rows = _rows(batch)
            sizes = {ROUTED_BASE if name == BASE else name: rows for name in names}
            with model.route(sizes):
                losses = self._losses(self.kind.join([batch] * len(names)))
            for name, part in zip(names, _parted(losses, rows), strict=True):
                parts[name].append(part)
        return {name: _gathered(iter(found)) for name, found in parts.items()}

    @contextlib.contextmanager
    def merged(self, name: str) -> Iterator[Callable[[], Seen]]:
        """An adapter merged into the base for a block, which is as it was afterwards; and what looks by it.

        Raises UserError for one that cannot be merged.
        """
        model = self.trained.model
        assert isinstance(model, LoraModel)
        model.merge(name)
        try:
            yield lambda: _gathered(self._losses(batch) for batch in self._each())
        finally:
            model.unmerge()

    def _each(self) -> Iterator[Batch]:
        for batch in self.batches:
            signals.obey()
            yield batch
            self.bar.advance()

    @torch.no_grad()
    def _losses(self, batch: Batch) -> RowLosses:
        place = self.trained.place
        here = {name: tensor.to(place.device) for name, tensor in batch.items()}
        with place.compute():
            return self.kind.losses(self.trained.model, here)


def _gathered(found: Iterator[RowLosses]) -> Seen:
    sums, rows = [], []
    for losses in found:
        sums.append(Sums().plus(losses))
        rows.append((losses.total / losses.count.to(losses.total.device).clamp(min=1)).cpu())
    return Seen(merged(sums), torch.cat(rows))


def _parted(losses: RowLosses, rows: int) -> Iterator[RowLosses]:
    counted = {name: values.split(rows) for name, values in losses.counted.items()}
    for place, (total, count) in enumerate(zip(losses.total.split(rows), losses.count.split(rows), strict=True)):
        yield RowLosses(total, count, {name: parts[place] for name, parts in counted.items()})


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))
