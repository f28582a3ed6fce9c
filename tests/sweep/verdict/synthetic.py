"""Studies that nobody ran, whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from lora_exp.sweep.verdict.judging import Replicate, Sample


@dataclass
class World:
    """Arms that are ``effects`` apart, looked at with the same ``rows``.

    Of two arms' difference: ``seed``, ``row`` and ``rest`` are √½ of the standard deviations between seeds, between
    rows and of what is left. ``is_rough``: rows are skewed and unlike in length, and seeds have heavy tails.
    """

    random: np.random.Generator
    effects: Sequence[float]
    rows: int = 60
    seed: float = 1.0
    row: float = 2.0
    rest: float = 3.0
    is_rough: bool = False
    counts: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.counts = self.random.integers(60, 128, self.rows).astype(float) if self.is_rough else np.full(self.rows, 9)
        self._shared = 5 * self._of_rows(1)
        self._own = self.row * self._of_rows(len(self.effects))

    def samples(self, seeds: int, first: Sequence[Sample] | None = None) -> list[Sample]:
        """So many more seeds of each arm, beside those of ``first``."""
        arms = list(first or [Sample(f"arm {number}") for number in range(len(self.effects))])
        for _ in range(seeds):
            common = 2 * self.random.standard_normal()  # of a seed, whatever the arm
            for number, effect in enumerate(self.effects):
                own = self.seed * self._of_a_seed() + common + effect
                rest = self.rest * self.random.standard_normal(self.rows)
                totals = (own + self._own[number] + self._shared[0] + rest) * self.counts
                replicate = Replicate(totals.sum() / self.counts.sum(), totals, self.counts)
                arms[number].replicates[str(len(arms[number].replicates))] = replicate
        return arms

    def _of_a_seed(self) -> float:
        return self.random.standard_t(6) / 1.5**0.5 if self.is_rough else self.random.standard_normal()

    def _of_rows(self, arms: int) -> np.ndarray:
        if self.is_rough:  # mean 0, variance 1
            return (self.random.gamma(2.0, 1.0, (arms, self.rows)) - 2) / 2**0.5
        return self.random.standard_normal((arms, self.rows))
