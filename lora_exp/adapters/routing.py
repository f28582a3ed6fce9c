"""Which adapter serves which part of the batch, and how often each adapter has run.

One `Route` is shared by all adapted layers of a model; a layer made on its own has one to itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from .replay import current_pass, draw_number, is_replaying, next_number, numbered_pass

BASE = "__base__"  # the name that routes samples through the frozen model alone, as in PEFT
_REMEMBERED_PASSES = 4096


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

    def split(self, length: int) -> list[tuple[str, int, int]]:
        """(name, start, stop) along a leading dimension of `length`."""
        assert self.sizes is not None
        batch = sum(self.sizes)
        if length not in (batch, batch * self.rows):
            raise ValueError(
                f"routing covers {batch} samples ({_described(self)}), but a layer was called with a leading "
                f"dimension of {length}; make the routed sizes add up to the batch, and do not adapt layers "
                "that see a regrouped batch (a mixture's experts)"
            )
        step = length // batch
        stops = list(itertools.accumulate(size * step for size in self.sizes))
        starts = [0, *stops[:-1]]
        return [span for span in zip(self.names, starts, stops, strict=True) if span[2] > span[1]]


@dataclasses.dataclass
class Clock:
    """What an adapter's dropout masks follow from: its own seed and its own count of training passes."""

    seed: int
    passes: int = 0


class Route:
    def __init__(self, plan: Plan | None = None) -> None:
        self.live = plan or Plan()
        self.clocks: dict[str, Clock] = {}
        self._part: Plan | None = None
        self.trained: tuple[str, ...] = ()  # whom the last training pass served
        self._passes: OrderedDict[int, tuple[Plan, dict[str, int]]] = OrderedDict()

    def plan(self) -> Plan:
        """The plan that holds for the layer call at hand, be it live or a replay."""
        if self._part is not None:
            return self._part
        if torch.compiler.is_compiling() or not self._passes:
            return self.live
        known = self._passes.get(current_pass() or 0)
        return self.live if known is None else known[0]

    @contextmanager
    def using(self, plan: Plan) -> Iterator[None]:
        outer, self.live = self.live, plan
        try:
            yield
        finally:
            self.live = outer

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """`name` alone, for calls on its slice of the batch, live or in a replay."""
        outer, self._part = self._part, Plan((name,))
        try:
            yield
        finally:
            self._part = outer

    @contextmanager
    def training_pass(self, draw: bool, drops: bool) -> Iterator[None]:
        """One forward pass that a backward pass may follow.

        draw: a replay of the whole model must be recognised; drops: dropout is on, so clocks move.
        """
        number = draw_number() if draw else next_number()
        if not (draw and is_replaying() and number in self._passes):
            while number in self._passes:
                number = draw_number()
            self._remember(number, drops)
        with numbered_pass(number):
            yield

    def pass_at_hand(self) -> object | None:
        """One object for all calls of one training pass and their replays, and for no other; None outside."""
        return self._passes.get(current_pass() or 0)

    @torch.compiler.disable
    def mask_seed(self, name: str, layer_key: int) -> int:
        """The seed of one adapter's dropout mask in one layer, the same when the layer is replayed."""
        known = self._passes.get(current_pass() or 0)
        if known is None or name not in known[1]:
            return draw_seed()  # no LoraModel around: the global RNG, as nn.Dropout
        text = f"{self.clocks[name].seed}:{known[1][name]}:{layer_key}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def _remember(self, number: int, drops: bool) -> None:
        counts: dict[str, int] = {}
        self.trained = self.live.names
        for name in dict.fromkeys(self.live.names):
            if name in self.clocks:
                counts[name] = self.clocks[name].passes
                self.clocks[name].passes += drops
        self._passes[number] = (self.live, counts)
        while len(self._passes) > _REMEMBERED_PASSES:
            self._passes.popitem(last=False)


def draw_seed() -> int:
    return int(torch.randint(0, 2**62, ()))


def sliced_plan(sizes: Mapping[str, int]) -> Plan:
    """Contiguous slices of the batch, in the mapping's order."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"route: {name!r} was given {size!r} samples; use a whole number of at least 0")
    if not sizes or sum(sizes.values()) == 0:
        raise ValueError(f"route: {dict(sizes)} routes no sample; give at least one adapter a sample")
    return Plan(tuple(sizes), tuple(sizes.values()))


def sampled_plan(names: Sequence[str]) -> Plan:
    """One adapter a sample; neighbours with the same adapter run together."""
    if isinstance(names, str) or not names:
        raise ValueError(f"route_samples: {names!r} is not a list with one adapter name a sample")
    runs = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return Plan(tuple(name for name, _ in runs), tuple(size for _, size in runs))


def _described(plan: Plan) -> str:
    assert plan.sizes is not None
    return ", ".join(f"{name}: {size}" for name, size in zip(plan.names, plan.sizes, strict=True))
