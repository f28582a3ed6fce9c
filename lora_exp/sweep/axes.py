"""The axes of a sweep's figures: numbers, in logarithms where they span decades, or categories."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeGuard

from lora_exp.sweep.jobs import text

_MOST_TICKS = 8
_NOTHING = "–"  # of a job that has no such value


@dataclass(frozen=True)
class Axis:
    """``categories`` in their order, or none, for numbers, whose ``ticks`` may be named."""

    label: str
    is_log: bool = False
    ticks: list[float] = field(default_factory=list)
    categories: list[str] = field(default_factory=list)

    def has(self, value: object) -> bool:
        """Whether it has a place for ``value``."""
        return bool(self.categories) or is_number(value)

    def place(self, value: object) -> float | str:
        """Where ``value`` is drawn."""
        if self.categories:
            return text(value) or _NOTHING
        assert is_number(value)
        return float(value)

    def order(self, place: float | str) -> float:
        """Of a place, along the axis."""
        return self.categories.index(place) if isinstance(place, str) else place


def axis_of(values: Sequence[object], label: str, ticks: bool = True) -> Axis:
    """An axis for ``values``. Of numbers a few are its ticks; a job without one has no place there."""
    given = [value for value in values if value is not None]
    if not given or not all(is_number(value) for value in given):
        return Axis(label, categories=list(dict.fromkeys(text(value) or _NOTHING for value in values)))
    numbers = sorted({float(value) for value in given if is_number(value)})
    return Axis(label, _spans_decades(numbers), numbers if ticks and len(numbers) <= _MOST_TICKS else [])


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is one that can be drawn."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _spans_decades(numbers: list[float]) -> bool:
    """Whether logarithms spread them better: over decades most are small (not so what was drawn evenly from 0 to 0.3);
    also three or more of which each is as many times the one before (4, 8, 16)."""
    if numbers[0] <= 0:
        return False
    middle = (statistics.median(numbers) - numbers[0]) / ((numbers[-1] - numbers[0]) or 1)
    ratios = [after / before for before, after in itertools.pairwise(numbers)]
    is_geometric = len(ratios) > 1 and all(math.isclose(ratio, ratios[0], rel_tol=0.01) for ratio in ratios)
    spans = numbers[-1] >= 10 * numbers[0] and (len(numbers) < 3 or middle < 0.3)
    return spans or (is_geometric and ratios[0] >= 1.5)
