"""Whether a plan fits into a GPU, and the largest batch or rank that does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from lora_exp.config import Config, uses_factors
from lora_exp.plan.estimate import GIB, Plan, Planner

_MOST_ROWS = 4096
_RANK_STEP = 8


@dataclass(frozen=True)
class Fit:
    """``free_gib`` is negative when it does not fit. The largest are 0 when nothing does, None when not asked."""

    fits: bool
    free_gib: float
    largest_batch: int
    largest_rank: int | None


def fit(planner: Planner, plan: Plan, config: Config) -> Fit | None:
    """None without ``plan.gpu_gib``. Ranks of 8 and more are rounded down to multiples of 8."""
    if config.plan.gpu_gib is None:
        return None
    budget = (config.plan.gpu_gib - config.plan.reserve_gib) * GIB
    free = budget - plan.total_bytes
    rows, rank = config.train.micro_batch_size, config.rank
    # Without checkpointing the logits are the peak whatever the batch, and memory is a straight line in it.
    straight = not config.train.gradient_checkpointing
    batch = _largest(lambda rows: planner.plan(rows=rows).total_bytes, rows, plan, budget, _MOST_ROWS, straight)
    largest_rank = None
    if uses_factors(config) and plan.modules:
        most = max(max(module.weight) for module in plan.modules)
        found = _largest(lambda rank: planner.plan(rank=rank).total_bytes, rank, plan, budget, most, straight)
        largest_rank = found // _RANK_STEP * _RANK_STEP if found >= _RANK_STEP else found
    return Fit(free >= 0, free / GIB, batch, largest_rank)


def _largest(bytes_at: Callable[[int], int], start: int, plan: Plan, budget: float, most: int, straight: bool) -> int:
    """The largest size that fits, by a straight line through two plans; where that is not sure, by a proof."""
    if sum(plan.base_bytes.values()) >= budget:
        return 0
    second = 2 * start if 2 * start <= most else max(1, start // 2)
    slope = (bytes_at(second) - plan.total_bytes) / (second - start) if second != start else 0.0
    if slope <= 0:
        return most if plan.total_bytes <= budget else 0
    guess = min(most, start + int((budget - plan.total_bytes) // slope))
    while not straight and guess > 0 and (needed := bytes_at(guess)) > budget:
        guess -= max(1, int((needed - budget) // slope))
    return max(guess, 0)
