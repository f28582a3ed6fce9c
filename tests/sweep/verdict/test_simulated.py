"""What the verdict claims, over studies whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from lora_exp.sweep.verdict.judging import Finding, judge

from .synthetic import World

STUDIES = 1000


@pytest.mark.slow
def test_of_arms_without_a_difference_one_is_called_better_in_one_study_of_twenty() -> None:
    """And 95 % intervals hold the truth in 93 to 97 %: where seeds and rows both matter, normal or not."""
    random, wrong, held = np.random.default_rng(7), 0, []
    for number in range(STUDIES):
        judged = judge(World(random, [0, 0, 0, 0], is_rough=number % 2 == 1).samples(5), margin=0.01)
        wrong += any(each.finding is Finding.BETTER for each in judged)
        held += [each.effect.difference <= each.effect.half_width for each in judged]
    assert len(held) == 6 * STUDIES
    assert wrong / STUDIES <= 0.05
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5])
def test_intervals_hold_around_a_difference_too(seeds: int) -> None:
    """Where the seeds are what matters; three of them are few."""
    random, held = np.random.default_rng(8), []
    for _ in range(STUDIES):
        [judged] = judge(World(random, [0, 1], rows=100, row=0.5, rest=1.0).samples(seeds), margin=0.01)
        difference = judged.effect.difference if judged.first == "arm 0" else -judged.effect.difference
        held.append(abs(difference - 1) <= judged.effect.half_width)
    assert 0.93 <= np.mean(held) <= 0.97


@pytest.mark.slow
@pytest.mark.parametrize(("arms", "seeds"), [(2, 5), (4, 3)])
def test_so_many_more_seeds_find_a_difference_of_the_margin_in_four_of_five_studies(arms: int, seeds: int) -> None:
    random, found, studies = np.random.default_rng(9), 0, 200
    for _ in range(studies):
        world = World(random, [-1.0] + [0.0] * (arms - 1), rows=100, row=0.2, rest=1.0)
        samples = world.samples(seeds)
        judged = about(samples)
        if judged.finding is Finding.OPEN:
            more = judged.more_seeds()
            assert more is not None
            judged = about(world.samples(more, samples))
        found += judged.finding is Finding.BETTER and judged.first == "arm 0"
    assert 0.7 <= found / studies <= 0.9


def about(samples):  # type: ignore[no-untyped-def]
    """The pair of the first two arms, which are the margin apart."""
    return next(each for each in judge(samples, margin=1.0) if {each.first, each.second} == {"arm 0", "arm 1"})


def test_arms_far_apart_are_told_apart_and_arms_alike_are_alike() -> None:
    world = World(np.random.default_rng(1), [0.0, 0.0, 50.0], rows=100, seed=0.01, row=0.01, rest=0.01)
    judged = {(each.first, each.second): each for each in judge(world.samples(5), margin=1.0)}
    findings = {frozenset(pair): each.finding for pair, each in judged.items()}
    assert findings[frozenset({"arm 0", "arm 1"})] is Finding.ALIKE
    assert judged["arm 0", "arm 2"].finding is Finding.BETTER
    assert judged["arm 0", "arm 2"].effect.difference == pytest.approx(50, abs=0.1)
    assert ("arm 2", "arm 0") not in judged


def test_with_few_rows_no_number_of_seeds_is_enough_but_one_of_rows_is() -> None:
    world = World(np.random.default_rng(3), [0.0, 0.0], rows=20, seed=0.1, row=5.0, rest=0.1)
    [judged] = judge(world.samples(5), margin=0.5)
    assert judged.finding is Finding.OPEN
    assert judged.more_seeds() is None
    rows = judged.more_rows()
    assert rows is not None
    bigger = World(np.random.default_rng(4), [0.0, -0.5], rows=20 + rows, seed=0.1, row=5.0, rest=0.1)
    [judged] = judge(bigger.samples(20), margin=0.5)
    assert judged.effect.half_width < 0.5
