"""Interleaved timing: every side runs once a round, in rotating order, so that a busy machine slows all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np

Side = Callable[[], object]


def race(sides: Mapping[str, Side], rounds: int, between: Mapping[str, Side] | None = None) -> dict[str, list[float]]:
    """Seconds of each side, a list by round; `between` runs before a side and is not timed. One round warms up."""
    names = list(sides)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for i in range(len(names)):
            name = names[(i + turn) % len(names)]
            if between:
                between[name]()
            started = time.perf_counter()
            sides[name]()
            if turn:
                times[name].append(time.perf_counter() - started)
    return times


def median_ms(times: dict[str, list[float]]) -> dict[str, float]:
    return {f"{name}_ms": round(float(np.median(values)) * 1e3, 3) for name, values in times.items()}


def ratio(times: dict[str, list[float]], over: str, under: str, level: float = 0.95) -> dict[str, float]:
    """Ratio of medians with its bootstrap interval; rounds are drawn in pairs, as both sides shared their load."""
    a, b = np.array(times[over]), np.array(times[under])
    drawn = np.random.default_rng(0).integers(0, len(a), (2000, len(a)))
    found = np.median(a[drawn], 1) / np.median(b[drawn], 1)
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    value = float(np.median(a) / np.median(b))
    return {"ratio": round(value, 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def geometric_mean(values: list[float]) -> float:
    return round(float(np.exp(np.mean(np.log(values)))), 3)


def exponent(xs: list[float], ys: list[float]) -> float:
    """The b of y ~ x^b, by least squares in logarithms."""
    return round(float(np.polyfit(np.log(xs), np.log(ys), 1)[0]), 3)
