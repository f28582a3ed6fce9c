"""Which adapter serves which part of a batch."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

import torch

from lora_exp.errors import UserError

BASE = "__base__"  # the name that routes samples through the frozen model alone, as in PEFT


@dataclasses.dataclass(frozen=True)
class Plan:
    """`sizes` None: `names[0]` serves the whole batch (no name: the base alone).

    Otherwise names[i] serves the next sizes[i] samples. `rows` is the number of rows one sample takes in
    a layer whose input came flattened to (batch * rows, ...).
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None
    rows: int = 1

    def for_inputs(self, inputs: Sequence[object]) -> Plan:
        """The plan with `rows` read off the model's inputs: (batch, rows, ...)."""
        batch = sum(self.sizes or ())
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch:
                return dataclasses.replace(self, rows=value.shape[1])
        return self

    def read(self, x: torch.Tensor) -> tuple[torch.Tensor, list[tuple[str, slice | None]]]:
        """Whom the slices of x's leading dimension go to, None being all of it; and x, repeated if it is one input
        for all samples, such as position ids."""
        if self.sizes is None:
            return x, [(self.names[0], None)]
        if x.shape[0] == 1 < sum(self.sizes):
            x = x.expand(sum(self.sizes), *x.shape[1:])
        spans = self.split(x.shape[0])
        if len(spans) == 1:
            return x, [(spans[0][0], None)]
        return x, [(name, slice(start, stop)) for name, start, stop in spans]

    def split(self, length: int) -> list[tuple[str, int, int]]:
        """(name, start, stop) along a leading dimension of `length`."""
        assert self.sizes is not None
        batch = sum(self.sizes)
        if length not in (batch, batch * self.rows):
            raise UserError(
                f"routing covers {batch} samples ({_described(self)}), but a layer was called with a leading "
                f"dimension of {length}; make the routed sizes add up to the batch, and do not adapt layers "
                "that see a regrouped batch (an expert of a mixture that is a layer of its own)"
            )
        step = length // batch
        stops = list(itertools.accumulate(size * step for size in self.sizes))
        starts = [0, *stops[:-1]]
        return [span for span in zip(self.names, starts, stops, strict=True) if span[2] > span[1]]


def sliced_plan(sizes: Mapping[str, int]) -> Plan:
    """Contiguous slices of the batch, in the mapping's order."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise UserError(f"route: {name!r} was given {size!r} samples; use a whole number of at least 0")
    if not sizes or sum(sizes.values()) == 0:
        raise UserError(f"route: {dict(sizes)} routes no sample; give at least one adapter a sample")
    return Plan(tuple(sizes), tuple(sizes.values()))


def sampled_plan(names: Sequence[str]) -> Plan:
    """One adapter a sample; neighbours with the same adapter run together."""
    if isinstance(names, str) or not names:
        raise UserError(f"route_samples: {names!r} is not a list with one adapter name a sample")
    runs = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return Plan(tuple(name for name, _ in runs), tuple(size for _, size in runs))


def _described(plan: Plan) -> str:
    assert plan.sizes is not None
    return ", ".join(f"{name}: {size}" for name, size in zip(plan.names, plan.sizes, strict=True))
