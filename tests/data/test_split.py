"""The split holds what ``val_fraction`` asks for, at any size and fraction, and never leaves a side empty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_exp.data.split import cut, held_out

FRACTIONS = st.floats(1e-9, 1, exclude_max=True)


@given(count=st.integers(2, 3000), fraction=FRACTIONS)
def test_the_nearest_number_is_held_out_and_never_none_or_all(count: int, fraction: float) -> None:
    number = sum(held_out(count, fraction))
    assert 1 <= number < count
    assert abs(number - min(max(count * fraction, 1), count - 1)) <= 0.501


@given(count=st.integers(40, 3000), fraction=st.floats(0.02, 0.98))
def test_it_is_spread_evenly(count: int, fraction: float) -> None:
    chosen = held_out(count, fraction)
    half = sum(chosen[: count // 2])
    assert abs(half - count // 2 * fraction) <= 1.5


@given(k=st.integers(2, 60), count=st.integers(60, 3000))
def test_one_kth_is_every_kth_as_it_was_in_earlier_versions(k: int, count: int) -> None:
    before = [index % k == k // 2 for index in range(count)]
    now = held_out(count, 1 / k)
    assert now == before or abs(sum(now) - count / k) < abs(sum(before) - count / k)


@pytest.mark.parametrize(("count", "fraction", "k"), [(1189, 0.05, 20), (5000, 0.2, 5)])
def test_the_shipped_data_keep_their_split(count: int, fraction: float, k: int) -> None:
    assert held_out(count, fraction) == [index % k == k // 2 for index in range(count)]


@pytest.mark.parametrize("count", [0, 1])
def test_too_few_are_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} cannot be split"):
        held_out(count, 0.5)


WIDTHS = st.lists(st.integers(0, 300), min_size=1, max_size=40)


@given(widths=WIDTHS, fraction=st.floats(0.001, 0.999))
def test_a_text_is_cut_where_it_was_asked_whatever_its_lines(widths: list[int], fraction: float) -> None:
    text = "\n".join("x" * width for width in widths)
    position = cut(text, fraction)
    smaller = min(fraction, 1 - fraction) * len(text)
    assert abs(len(text) - position - fraction * len(text)) <= 0.1 * smaller + 1


def test_a_cut_near_a_line_falls_between_lines() -> None:
    text = "\n".join(f"line {index} of the book" for index in range(1000))
    position = cut(text, 0.05)
    assert text[position - 1] == "\n"
    assert text[position:].count("\n") == 49
    assert ("word " * 100)[cut("word " * 100, 0.5) - 1] == " "
