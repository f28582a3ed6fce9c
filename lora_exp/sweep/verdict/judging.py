"""Every pair of arms: which is better, or whether they are alike, or that nothing of it is known yet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from lora_exp.sweep.verdict.effects import LEVEL, Effect, effect_of_means, effect_of_rows
from lora_exp.sweep.verdict.power import enough_rows, enough_seeds


class Finding(Enum):
    """What is known of a pair."""

    BETTER = "better"
    ALIKE = "indistinguishable"
    OPEN = "not enough evidence"


@dataclass(frozen=True)
class Replicate:
    """What an arm came to with one seed: ``value``, and by row, where it is known, the ``totals`` over ``counts``
    predictions, (R,) each, of which the value is the mean."""

    value: float
    totals: np.ndarray | None = None
    counts: np.ndarray | None = None


@dataclass(frozen=True)
class Sample:
    """An arm by its ``label``, and its replicates by their seeds."""

    label: str
    replicates: dict[str, Replicate] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        return float(np.mean([each.value for each in self.replicates.values()]))


@dataclass(frozen=True)
class Judgement:
    """``first`` against ``second``: the ``effect`` is by how much the first is better.

    ``p_value`` and ``p_beyond`` (of a difference of ``margin`` or more) are Holm's, over all ``pairs``.
    """

    first: str
    second: str
    effect: Effect
    p_value: float
    p_beyond: float
    margin: float
    pairs: int

    @property
    def finding(self) -> Finding:
        """Alike before better: surely less than the margin apart is what the margin was named for."""
        if self.p_beyond <= 1 - LEVEL:
            return Finding.ALIKE
        return Finding.BETTER if self.p_value <= 1 - LEVEL else Finding.OPEN

    def more_seeds(self) -> int | None:
        """How many more would find a difference of the margin in four of five studies; None: the rows are too few."""
        seeds = enough_seeds(self.effect, self.margin, (1 - LEVEL) / self.pairs)
        return None if seeds is None else max(1, seeds - self.effect.seeds)

    def more_rows(self) -> int | None:
        """How many more rows, with as many seeds as it takes; None where no number is enough."""
        rows = enough_rows(self.effect, self.margin, (1 - LEVEL) / self.pairs)
        return None if rows is None else max(1, rows - self.effect.rows)


def judge(samples: Sequence[Sample], margin: float, higher_is_better: bool = False) -> list[Judgement]:
    """Each pair, its better one first. A pair that has fewer than two seeds in common is left out.

    Alike: surely not ``margin`` apart, even where surely apart. Both are corrected for the number of pairs (Holm 1979),
    so that among all pairs of a sweep without any difference one is called better in at most one of twenty.
    """
    effects = [(one, other, effect_between(one, other)) for one, other in itertools.combinations(samples, 2)]
    known = [(one, other, effect) for one, other, effect in effects if effect is not None]
    if not known:
        return []
    apart = holm([effect.p_value for *_, effect in known])
    beyond = holm([effect.p_beyond(margin) for *_, effect in known])
    found = zip(known, apart, beyond, strict=True)
    return [_judgement(*pair, p, q, margin, len(known), higher_is_better) for pair, p, q in found]


def effect_between(one: Sample, other: Sample) -> Effect | None:
    """``one`` less ``other``, by the seeds that both have; None for fewer than two."""
    seeds = [seed for seed in one.replicates if seed in other.replicates]
    if len(seeds) < 2:
        return None
    pairs = [(one.replicates[seed], other.replicates[seed]) for seed in seeds]
    if counts := _common_rows(pairs):
        return effect_of_rows(np.stack([_less(here, there) for here, there in pairs]), counts[0])
    return effect_of_means(np.array([here.value - there.value for here, there in pairs]))


def holm(p_values: Sequence[float]) -> list[float]:
    """Corrected for their number (statsmodels' has the garbage collected at each call, which takes half a second)."""
    values = np.asarray(p_values)
    order = np.argsort(values)
    steps = values[order] * np.arange(len(values), 0, -1)
    corrected = np.empty_like(values)
    corrected[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return [float(value) for value in corrected]


def _judgement(
    one: Sample, other: Sample, effect: Effect, p: float, q: float, margin: float, pairs: int, higher_is_better: bool
) -> Judgement:
    if (effect.difference >= 0) is higher_is_better:
        return Judgement(one.label, other.label, effect if higher_is_better else effect.turned(), p, q, margin, pairs)
    return Judgement(other.label, one.label, effect.turned() if higher_is_better else effect, p, q, margin, pairs)


def _common_rows(pairs: Sequence[tuple[Replicate, Replicate]]) -> list[np.ndarray]:
    """The rows' counts, of every replicate, if they are all the same rows and more than one."""
    counts = [each.counts for pair in pairs for each in pair]
    first = counts[0]
    if first is None or len(first) < 2 or not all(each is not None and np.array_equal(first, each) for each in counts):
        return []
    return [first]


def _less(one: Replicate, other: Replicate) -> np.ndarray:
    assert one.totals is not None
    assert other.totals is not None
    less: np.ndarray = one.totals - other.totals
    return less
