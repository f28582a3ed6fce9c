"""How many seeds, or rows, would be enough."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from lora_exp.sweep.verdict.effects import Effect, reach

POWER = 0.8
MOST = 1000  # seeds; more than that nobody trains
_MOST_ROWS = 10**6
_SHARES = (np.arange(50) + 0.5) / 50


def enough_seeds(effect: Effect, difference: float, level: float) -> int | None:
    """How many seeds, in all, find a true ``difference`` in four of five studies, at a p-value of ``level``.

    It is not asked about the difference that was seen: that one is chance's as well. None: not even ``MOST`` are
    enough, as the rows are too few.
    """
    return _least(lambda seeds: power(effect, difference, level, seeds), effect.seeds, MOST)


def enough_rows(effect: Effect, difference: float, level: float) -> int | None:
    """How many rows at least, where seeds are not what lacks."""
    if not effect.rows:
        return None
    return _least(lambda rows: power(effect, difference, level, MOST, rows), effect.rows, _MOST_ROWS)


def power(effect: Effect, difference: float, level: float, seeds: int, rows: int | None = None) -> float:
    """The share of studies with so many ``seeds`` (and ``rows``) that call a true ``difference`` one.

    A few seeds do not know their variance well, so that it is a mean over the variances that could have given theirs,
    and over those that the study then would find. Of the rows it is taken as known.
    """
    from scipy.special import ndtr
    from scipy.stats import chi2

    rows = rows or effect.rows
    of_rows = effect.row_variance * effect.rows / rows if rows else 0.0
    known, then = effect.seeds - 1, seeds - 1
    true = effect.seed_variance * known / chi2.ppf(_SHARES, known)[:, None] / seeds  # (true, found)
    found = true * chi2.ppf(_SHARES, then) / then
    errors = np.sqrt(true + of_rows)
    if not errors.all():
        return 1.0
    return float(ndtr((difference - reach(level / 2, found, seeds, of_rows, rows)) / errors).mean())


def _least(power: Callable[[int], float], first: int, most: int) -> int | None:
    """The least number from ``first`` to ``most`` that is enough."""
    if power(most) < POWER:
        return None
    low, high = first - 1, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return high
