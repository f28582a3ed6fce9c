"""What is said of a change, on changes whose answer is known."""

from __future__ import annotations

import pytest
import torch

from lora_exp.adapters.inspection.changes import Change
from lora_exp.use.analysing.overlap import grid, overlaps, powers_of_two
from lora_exp.use.analysing.spectrum import effective_rank, figures_of, intruders
from lora_exp.use_config import AnalyseConfig


def basis(size: int, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, count, generator=generator)).Q


def change(values: list[float], weight: torch.Tensor, seed: int = 0) -> Change:
    S = torch.tensor(values)
    return Change("layer", "linear", basis(len(weight), len(S), seed), S, basis(weight.shape[1], len(S), seed + 100),
                  lambda: weight, False)  # fmt: skip


@pytest.mark.parametrize(("values", "rank"), [([2.0] * 5, 5), ([3.0], 1), ([1.0, 0.0], 1), ([0.0, 0.0], 0)])
def test_equal_values_are_as_many_directions(values: list[float], rank: float) -> None:
    assert effective_rank(torch.tensor(values)) == pytest.approx(rank)


def test_figures_of_a_known_spectrum() -> None:
    found = figures_of(change([3.0, 1.0, 0.1], torch.eye(12)), AnalyseConfig())
    assert found.norm == pytest.approx(10.01**0.5)
    assert found.relative == pytest.approx((10.01 / 12) ** 0.5)
    assert found.stable_rank == pytest.approx(10.01 / 9)
    assert (found.rank_90, found.rank_99) == (2, 2)


def test_a_large_new_direction_intrudes_and_a_small_one_does_not() -> None:
    weight = basis(40, 40, 1)[:, :30] * torch.linspace(3, 1, 30) @ basis(30, 30, 2).T
    assert intruders(weight, change([0.01], weight, 3), 10, 0.5) == []
    assert 0 in intruders(weight, change([50.0], weight, 3), 10, 0.7)  # it comes first now
    own = torch.linalg.svd(weight)
    along = Change("layer", "linear", own.U[:, :1], torch.tensor([50.0]), own.Vh[:1].T, lambda: weight, False)
    assert intruders(weight, along, 10, 0.7) == []  # a direction that the weight has already, made larger


def test_the_same_directions_are_shared_and_others_as_chance_has_it() -> None:
    weight = torch.zeros(64, 256)
    one, same = change([4.0, 3.0, 2.0, 1.0], weight), change([9.0, 8.0, 7.0, 6.0], weight)
    found = list(overlaps({"a": {"layer": one}, "b": {"layer": same}}))
    assert [each.rank for each in found] == [1, 2, 4]
    assert all(each.by_inputs == pytest.approx(1, abs=1e-5) for each in found)
    shared = grid({"layer": one}, {"layer": same})
    torch.testing.assert_close(shared.diagonal(), torch.ones(4))
    torch.testing.assert_close(shared, torch.ones(4, 4))  # the smaller subspace lies in the larger
    others = [
        next(iter(overlaps({"a": {"layer": one}, "b": {"layer": change([1.0], weight, seed)}})))
        for seed in range(1, 200)
    ]
    mean = sum(each.by_inputs for each in others) / len(others)
    assert mean == pytest.approx(others[0].chance, rel=0.3)


def test_ranks_that_are_asked_for() -> None:
    assert powers_of_two(12) == [1, 2, 4, 8, 12]
    assert powers_of_two(8) == [1, 2, 4, 8]
    assert powers_of_two(0) == []
