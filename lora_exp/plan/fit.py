"""Whether a plan fits into a GPU, and the largest batch or rank that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_exp.config import Config
from lora_exp.plan.estimate import GIB, Plan, Planner

_MOST_ROWS = 4096
_RANK_STEP = 8
_SECANTS = 8  # after as many plans the rest is halved


@dataclass(frozen=True)
class Fit:
    """``free_gib`` is negative when it does not fit. The largest are 0 when nothing does, None when not asked."""

    fits: bool
    free_gib: float
    largest_batch: int
    largest_rank: int | None


def fit(planner: Planner, plan: Plan, config: Config) -> Fit | None:
    """None without ``plan.gpu_gib``.

    Ranks of 8 and more are rounded down to multiples of 8, and above no layer's dimensions.
    """
    if config.plan.gpu_gib is None:
        return None
    budget = (config.plan.gpu_gib - config.plan.reserve_gib) * GIB
    free = budget - plan.total_bytes
    rows, rank = config.train.micro_batch_size, config.rank
    batch = _largest(lambda rows: planner.plan(rows=rows).total_bytes, rows, plan, budget, _MOST_ROWS)
    largest_rank = None
    if config.adapter.has_factors and plan.modules:
        most = max(rank, min(max(module.weight) for module in plan.modules))
        found = _largest(lambda rank: planner.plan(rank=rank).total_bytes, rank, plan, budget, most)
        largest_rank = found // _RANK_STEP * _RANK_STEP if found >= _RANK_STEP else found
    return Fit(free >= 0, free / GIB, batch, largest_rank)


def _largest(bytes_at: Callable[[int], int], start: int, plan: Plan, budget: float, most: int) -> int:
    """The largest size up to ``most`` that fits, found between one that does and one that does not.

    Memory is nearly a straight line in the size, with bends where another point of the step becomes the highest.
    """
    if sum(plan.base_bytes.values()) >= budget:
        return 0
    known = {start: plan.total_bytes}
    fits, fails, guess = 0, most + 1, start
    while fails - fits > 1:
        size = min(max(guess, fits + 1), fails - 1)
        if size not in known:
            known[size] = bytes_at(size)
        fits, fails = (size, fails) if known[size] <= budget else (fits, size)
        guess = _secant(known, budget, fits, fails)
    return fits


def _secant(known: dict[int, int], budget: float, fits: int, fails: int) -> int:
    """Where the line through the two plans nearest to the budget meets it."""
    near = sorted(known, key=lambda size: abs(known[size] - budget))[:2]
    if len(near) == 1:
        return 2 * near[0] if fits else near[0] // 2
    slope = (known[near[1]] - known[near[0]]) / (near[1] - near[0])
    if slope <= 0 or len(known) > _SECANTS:
        return (fits + fails) // 2
    return near[0] + int((budget - known[near[0]]) // slope)
