"""A world of one costs and changes nothing; of several, who does what follows from rank and size alone."""

from __future__ import annotations

import pytest
import torch

from lora_exp.machine.distributed import ALONE, World


def test_one_process_is_given_back_what_it_has() -> None:
    values, parameter = torch.ones(3), torch.nn.Parameter(torch.ones(2))
    assert ALONE.summed(values) is values
    assert ALONE.totals([3, 4]) == [3, 4]
    assert ALONE.gathered([{"loss": 1.0}]) == [{"loss": 1.0}]
    assert list(ALONE.share("abc")) == [("a", True), ("b", True), ("c", True)]
    ALONE.sum_gradients([parameter])
    assert parameter.grad is None
    assert ALONE.device("cuda:1") == "cuda:1"


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_each_micro_batch_is_one_processs(size: int, count: int) -> None:
    worlds = [World(rank, size) for rank in range(size)]
    assert sorted(index for world in worlds for index in world.own(count)) == list(range(count))
    assert {world.most(count) for world in worlds} == {max(len(world.own(count)) for world in worlds)}
    assert all(world.most(count) - len(world.own(count)) in (0, 1) for world in worlds)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_an_evaluation_is_shared_out_evenly_and_each_batch_counts_once(size: int, count: int) -> None:
    shares = [list(World(rank, size).share(range(count))) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(thing for share in shares for thing, counts in share if counts) == list(range(count))
