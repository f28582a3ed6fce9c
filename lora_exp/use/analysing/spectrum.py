"""What is to be said of one layer's change: how large it is, how many directions it has, which are new to the weight.

Letters: N output features, K inputs, k singular values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_exp.adapters.inspection.changes import Change
from lora_exp.use_config import AnalyseConfig


@dataclass(frozen=True)
class LayerFigures:
    """``relative``: the change's Frobenius norm as a share of the weight's. ``effective_rank``: the exponential of the
    entropy of the singular values' shares (Roy and Vetterli 2007); ``stable_rank``: the squared Frobenius norm by the
    squared largest singular value. ``rank_90``, ``rank_99``: how many singular values hold that share of the squares.
    ``intruders``: of the changed weight's first directions, those unlike all of the base's (arXiv 2410.21228);
    None: not looked for. ``spectrum``: all singular values, falling.
    """

    layer: str
    layer_type: str
    outputs: int
    inputs: int
    norm: float
    relative: float
    effective_rank: float
    stable_rank: float
    rank_90: int
    rank_99: int
    intruders: int | None
    spectrum: list[float]


def figures_of(change: Change, section: AnalyseConfig) -> LayerFigures:
    weight = change.weight().float()
    values = change.S.double()
    squares = values.square()
    total = float(squares.sum())
    return LayerFigures(
        layer=change.layer,
        layer_type=change.layer_type,
        outputs=len(change.U),
        inputs=len(change.V),
        norm=total**0.5,
        relative=total**0.5 / max(float(torch.linalg.vector_norm(weight)), 1e-30),
        effective_rank=effective_rank(values),
        stable_rank=total / float(squares[0]) if total else 0.0,
        rank_90=_holding(squares, 0.9),
        rank_99=_holding(squares, 0.99),
        intruders=len(intruders(weight, change, section.top, section.similarity)) if section.intruders else None,
        spectrum=change.S.tolist(),
    )


def effective_rank(values: Tensor) -> float:
    """exp(-Σ p log p) of the shares p of singular values (k,); 0 of a change of nothing."""
    total = values.sum()
    if not total:
        return 0.0
    shares = values / total
    return float(torch.special.entr(shares).sum().exp())


def intruders(weight: Tensor, change: Change, top: int, similarity: float) -> list[int]:
    """Which of the first ``top`` left singular vectors of W + the change (N, K) are less than ``similarity`` like each
    of W's (algorithm 1 of arXiv 2410.21228): they are new to the weight."""
    before = torch.linalg.svd(weight, full_matrices=False).U  # (N, min(N, K))
    changed = weight + change.U * change.S @ change.V.T
    after = torch.linalg.svd(changed, full_matrices=False).U[:, :top]
    likest = (before.T @ after).abs().amax(0)  # (top,)
    return [place for place, cosine in enumerate(likest.tolist()) if cosine < similarity]


def _holding(squares: Tensor, share: float) -> int:
    """How many of the squared singular values (k,) hold ``share`` of their sum; 0 of a change of nothing."""
    total = squares.sum()
    if not total:
        return 0
    reached = squares.cumsum(0) >= share * total * (1 - 1e-12)
    return int(reached.nonzero()[0]) + 1
