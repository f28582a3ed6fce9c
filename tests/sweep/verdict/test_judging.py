"""Differences, intervals, p-values and their correction, against scipy's and statsmodels'."""

from __future__ import annotations

import numpy as np
import pandas
import pytest
from scipy import stats

from lora_exp.sweep.verdict.effects import effect_of_means, effect_of_rows
from lora_exp.sweep.verdict.judging import Finding, Replicate, Sample, effect_between, holm, judge

RANDOM = np.random.default_rng(0)


def arm(label: str, values: dict[str, float]) -> Sample:
    return Sample(label, {seed: Replicate(value) for seed, value in values.items()})


def test_without_rows_it_is_the_paired_t_test() -> None:
    one, other = RANDOM.normal(0.3, 1, 6), RANDOM.normal(0, 1, 6)
    effect, theirs = effect_of_means(one - other), stats.ttest_rel(one, other)
    interval = theirs.confidence_interval(0.95)
    assert effect.p_value == pytest.approx(theirs.pvalue, rel=1e-6)
    assert effect.difference + effect.half_width == pytest.approx(interval.high)
    assert effect.difference - effect.half_width == pytest.approx(interval.low)


def test_equivalence_is_statsmodels_two_one_sided_tests() -> None:
    from statsmodels.stats.weightstats import ttost_paired

    one = RANDOM.normal(0, 1, 8)
    other = one + RANDOM.normal(0.05, 0.1, 8)
    for margin in (0.01, 0.1, 0.3):
        theirs, *_ = ttost_paired(one, other, -margin, margin)
        assert effect_of_means(one - other).p_beyond(margin) == pytest.approx(theirs, rel=1e-6)


def test_the_correction_is_statsmodels() -> None:
    from statsmodels.stats.multitest import multipletests

    for count in (1, 2, 6, 28):
        values = RANDOM.uniform(0, 0.2, count) ** 2
        assert holm(values) == pytest.approx(multipletests(values, method="holm")[1])


def test_variances_of_seeds_and_rows_are_those_of_a_two_way_analysis() -> None:
    from statsmodels.formula.api import ols
    from statsmodels.stats.anova import anova_lm

    seeds, rows = 4, 9
    table = 0.5 + RANDOM.normal(0, 1, (seeds, 1)) + RANDOM.normal(0, 2, rows) + RANDOM.normal(0, 0.5, (seeds, rows))
    effect = effect_of_rows(table * 7, np.full(rows, 7))
    each = [(d, s, r) for s, line in enumerate(table) for r, d in enumerate(line)]
    analysed = anova_lm(ols("d ~ C(s) + C(r)", pandas.DataFrame(each, columns=["d", "s", "r"])).fit())
    squares = analysed["mean_sq"]
    assert effect.difference == pytest.approx(table.mean())
    assert effect.seed_variance == pytest.approx(squares["C(s)"] / rows)
    assert effect.row_variance == pytest.approx((squares["C(r)"] - squares["Residual"]) / (seeds * rows))


def test_a_row_counts_by_its_predictions() -> None:
    counts = RANDOM.integers(1, 100, 30).astype(float)
    totals = RANDOM.normal(0, 1, (5, 30)) * counts
    effect = effect_of_rows(totals, counts)
    means = totals.sum(1) / counts.sum()
    assert effect.difference == pytest.approx(means.mean())
    assert effect.seed_variance == pytest.approx(means.var(ddof=1))


def test_a_p_value_is_where_the_interval_ends() -> None:
    """Of seeds and rows together, for which nobody has an oracle: one is the other's inverse."""
    table = RANDOM.normal(0, 1, (4, 1)) + RANDOM.normal(0, 2, 20) + RANDOM.normal(0, 1, (4, 20))
    table -= table.mean()
    width = effect_of_rows(table, np.ones(20)).half_width
    assert effect_of_rows(table + width, np.ones(20)).p_value == pytest.approx(0.05, rel=1e-4)
    assert effect_of_rows(table, np.ones(20)).p_value == pytest.approx(1)


def test_only_common_seeds_are_paired() -> None:
    one = arm("one", {"0": 1.0, "1": 2.0, "2": 9.0})
    other = arm("other", {"1": 1.5, "0": 0.9, "7": 0.0})
    effect = effect_between(one, other)
    assert effect is not None
    assert effect.seeds == 2
    assert effect.difference == pytest.approx(0.3)
    assert effect_between(one, arm("alone", {"0": 1.0, "8": 2.0})) is None
    assert judge([one, arm("alone", {"0": 1.0})], 0.1) == []


def test_rows_that_are_not_the_same_are_not_paired() -> None:
    def replicate(counts: list[float]) -> Replicate:
        return Replicate(1.0, RANDOM.normal(0, 1, len(counts)), np.array(counts))

    one = Sample("one", {seed: replicate([3, 4]) for seed in "01"})
    same = Sample("same", {seed: replicate([3, 4]) for seed in "01"})
    unlike = Sample("unlike", {seed: replicate([3, 5]) for seed in "01"})
    effects = [effect_between(one, other) for other in (same, unlike)]
    assert [effect.rows for effect in effects if effect] == [2, 0]


def test_the_same_bits_are_alike() -> None:
    values = {"0": 1.0, "1": 2.0, "2": 1.5}
    [judged] = judge([arm("A", values), arm("again", values)], 0.01)
    assert judged.finding is Finding.ALIKE
    assert judged.effect.half_width == 0


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_the_better_one_is_named_first(higher_is_better: bool) -> None:
    low, high = arm("low", {"0": 1.0, "1": 1.1, "2": 1.0}), arm("high", {"0": 2.0, "1": 2.1, "2": 2.05})
    for samples in ([low, high], [high, low]):
        [judged] = judge(samples, 0.01, higher_is_better)
        assert judged.first == ("high" if higher_is_better else "low")
        assert judged.effect.difference == pytest.approx(1.0167, abs=1e-4)
        assert judged.finding is Finding.BETTER
