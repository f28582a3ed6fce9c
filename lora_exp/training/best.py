"""Which evaluation was the best so far, and whether going on still pays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Best:
    """Fed with records, in their order; one that it has seen already changes nothing.

    ``metric``: the figure of a record that decides. ``patience``: how many evaluations in a row may be no better than
    the best by more than ``min_delta`` (as transformers' ``EarlyStoppingCallback`` counts); None: any number. What was
    evaluated before the first step is no candidate, as nothing was trained. ``cut_at``: the step at which somebody else
    has ended the training; one that goes on does not know of it.
    """

    metric: str = "eval/loss"
    higher_is_better: bool = False
    patience: int | None = None
    min_delta: float = 0.0
    step: int | None = None
    value: float | None = None
    without_gain: int = 0
    seen: int = 0
    cut_at: int | None = None

    def note(self, record: Mapping[str, Any]) -> bool:
        """Whether the evaluation in ``record`` is the best so far."""
        if self.metric not in record or not record["step"]:
            return False
        step, value = int(record["step"]), float(record[self.metric])
        if step > self.seen:
            gain = self._gain(value)
            self.without_gain = 0 if gain > self.min_delta else self.without_gain + 1
            self.seen = step
            if gain > 0:
                self.step, self.value = step, value
        return step == self.step

    def _gain(self, value: float) -> float:
        """How much better than the best; a NaN is no gain on anything but nothing."""
        if self.value is None or (math.isnan(self.value) and not math.isnan(value)):
            return math.inf
        if math.isnan(value):
            return -math.inf
        return value - self.value if self.higher_is_better else self.value - value

    @property
    def should_stop(self) -> bool:
        """Whether the patience is used up, or the training cut."""
        return self.cut_at is not None or self.is_impatient

    @property
    def is_impatient(self) -> bool:
        """Whether the patience is used up."""
        return self.patience is not None and self.without_gain >= self.patience

    def state(self) -> dict[str, Any]:
        """What it has seen, as plain JSON."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state``."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("step", "value", "without_gain", "seen")
