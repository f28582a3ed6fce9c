"""How far two runs have changed the same directions (LoRA, arXiv 2106.09685, §7.2).

Letters: K inputs or N outputs, k singular values; i and j leading directions of the one and of the other.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_exp.adapters.inspection.changes import Change


@dataclass(frozen=True)
class Overlap:
    """Of the runs ``one`` and ``other`` in a layer, at ``rank`` leading directions of each: 0 nothing, 1 the same
    subspace. ``by_inputs``: of what they look at (V); ``by_outputs``: of what they write (U). ``chance``: what two
    random subspaces of that size share on average, of the inputs.
    """

    one: str
    other: str
    layer: str
    rank: int
    by_inputs: float
    by_outputs: float
    chance: float


def overlaps(runs: Mapping[str, Mapping[str, Change]]) -> Iterator[Overlap]:
    """Of each pair of runs, in each layer that both have changed, at ranks 1, 2, 4, … and the smaller of theirs."""
    for (one, ours), (other, theirs) in itertools.combinations(runs.items(), 2):
        for layer in [layer for layer in ours if layer in theirs]:
            a, b = ours[layer], theirs[layer]
            most = min(_directions(a), _directions(b))
            for rank in powers_of_two(most):
                by_inputs = _shared(a.V[:, :rank], b.V[:, :rank])
                by_outputs = _shared(a.U[:, :rank], b.U[:, :rank])
                yield Overlap(one, other, layer, rank, by_inputs, by_outputs, rank / len(a.V))


def grid(ours: Mapping[str, Change], theirs: Mapping[str, Change]) -> Tensor:
    """(i, j) the similarity φ(i, j) of §7.2, of the directions of inputs, on average over the layers of both."""
    layers = [layer for layer in ours if layer in theirs]
    most = [min(_directions(found[layer]) for layer in layers) for found in (ours, theirs)]
    return torch.stack([_similarities(ours[layer].V, theirs[layer].V, *most) for layer in layers]).mean(0)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … and ``most``."""
    return sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), *([most] if most else [])})


def _similarities(one: Tensor, other: Tensor, i: int, j: int) -> Tensor:
    """φ(i, j) = ||Vᵢᵀ Vⱼ||² / min(i, j) for all of the first i of ``one`` and j of ``other`` (K, k)."""
    squares = (one[:, :i].T @ other[:, :j]).square()
    sums = squares.cumsum(0).cumsum(1)
    smaller = torch.minimum(torch.arange(1, i + 1)[:, None], torch.arange(1, j + 1)[None])
    return sums / smaller.to(sums)


def _shared(one: Tensor, other: Tensor) -> float:
    return float((one.T @ other).square().sum() / one.shape[1])


def _directions(change: Change) -> int:
    """How many of its directions are more than rounding."""
    largest = float(change.S[0]) if len(change.S) else 0.0
    return int(change.S.gt(1e-6 * largest).sum()) if largest else 0
