"""The difference between two arms, and what chance has to do with it.

Letters: S seeds that both arms were trained with, R rows that both were looked at with.

The same seed gives both arms the same data order, and the same rows are asked of both, so that what is compared are
differences d[s, r] = effect + of seed s + of row r + rest. Seeds and rows are both drawn from what there might have
been (crossed random effects): more seeds alone do not make a few rows speak for all. Percentile bootstraps of five
seeds cover too little, and so do degrees of freedom by Satterthwaite, which jump up just where the seeds happen to lie
close together: tests/sweep/verdict/test_simulated.py says how much this covers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
_LEAST_P = 1e-60


@dataclass(frozen=True)
class Effect:
    """A mean difference over ``seeds`` and ``rows``; ``rows`` is 0 where it is not known row by row.

    ``seed_variance``: of one seed's mean difference. ``row_variance``: of the mean that other rows, as many, would have
    given.
    """

    difference: float
    seeds: int
    rows: int
    seed_variance: float
    row_variance: float

    @property
    def half_width(self) -> float:
        """Of the 95 % interval around ``difference``."""
        return float(reach((1 - LEVEL) / 2, self.seed_variance / self.seeds, self.seeds, self.row_variance, self.rows))

    @property
    def p_value(self) -> float:
        """Of a difference that is none, two-sided."""
        return min(1.0, 2 * self._share_beyond(abs(self.difference)))

    def p_beyond(self, margin: float) -> float:
        """Of a difference that is ``margin`` or more, either way: two one-sided tests (Schuirmann 1987)."""
        return self._share_beyond(margin - abs(self.difference))

    def _share_beyond(self, distance: float) -> float:
        """The share of chance's differences above ``distance``: at which ``reach`` is just that far."""
        from scipy.optimize import brentq

        if distance <= 0:
            return 1 - self._share_beyond(-distance) if distance else 0.5
        of_seeds = self.seed_variance / self.seeds

        def too_far(log_share: float) -> float:
            found = float(reach(math.exp(log_share), of_seeds, self.seeds, self.row_variance, self.rows))
            return math.log(max(found, 1e-300)) - math.log(distance)

        low, high = math.log(_LEAST_P), math.log(0.5 - 1e-9)
        if too_far(low) < 0 or too_far(high) > 0:
            return _LEAST_P if too_far(low) < 0 else 0.5
        return math.exp(brentq(too_far, low, high))

    def turned(self) -> Effect:
        """The same from the other side."""
        return Effect(-self.difference, self.seeds, self.rows, self.seed_variance, self.row_variance)


def reach(share: float, of_seeds: float | np.ndarray, seeds: int, of_rows: float | np.ndarray, rows: int) -> np.ndarray:
    """How far from the true one at most ``share`` of the means lie, one-sided, by the variances of a mean.

    √(t²·of_seeds + t'²·of_rows), each t by the degrees of freedom that its variance has. It never covers too little
    (Banerjee 1960, Sankhyā 22, 357-358), and exactly enough where one of the two is all.
    """
    from scipy.special import stdtrit

    by_seeds = stdtrit(seeds - 1, share) ** 2 * of_seeds
    found: np.ndarray = np.sqrt(by_seeds + (stdtrit(rows - 1, share) ** 2 * of_rows if rows > 1 else 0.0))
    return found


def effect_of_means(differences: np.ndarray) -> Effect:
    """Of one difference a seed, (S,), with S at least 2: the rows are taken as all that there are."""
    return Effect(float(differences.mean()), len(differences), 0, float(differences.var(ddof=1)), 0.0)


def effect_of_rows(totals: np.ndarray, counts: np.ndarray) -> Effect:
    """Of differences between the rows' sums, (S, R), of ``counts`` (R,) predictions each; S and R at least 2.

    A mean a prediction is a ratio of sums, which is linearised around the mean (as in Cochran 1977, §6).
    """
    mean = totals.sum() / (len(totals) * counts.sum())
    differences = mean + (totals - mean * counts) / counts.mean()  # (S, R)
    seeds, rows = differences.shape
    by_seed, by_row = differences.mean(1), differences.mean(0)
    rest = differences - by_seed[:, None] - by_row + mean
    rest_variance = (rest**2).sum() / ((seeds - 1) * (rows - 1))
    row_variance = max(0.0, (by_row.var(ddof=1) - rest_variance / seeds) / rows)
    return Effect(float(mean), seeds, rows, float(by_seed.var(ddof=1)), float(row_variance))
