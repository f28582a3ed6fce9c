"""The loss of one run's adapter with every layer's change cut to a rank: what smaller ranks would have found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from lora_exp.adapters import LoraModel
from lora_exp.adapters.inspection.changes import Change
from lora_exp.adapters.shrinking import add_shrunk
from lora_exp.progress import Steps
from lora_exp.training.metrics import mean_loss
from lora_exp.use.analysing.overlap import powers_of_two
from lora_exp.use.loading import BASE, Trained
from lora_exp.use.looking import Look, Seen
from lora_exp.use.rows import Rows


@dataclass(frozen=True)
class Point:
    """``loss`` at ``rank`` (nats a prediction), ``above`` the run's own, and that difference's standard error over the
    rows; ``kept``: the share of the squared change that is left, over all layers."""

    rank: int
    loss: float
    above: float
    error: float
    kept: float


@dataclass(frozen=True)
class Curve:
    """``smallest``: the smallest rank whose loss is at most ``margin`` above the run's own loss; None: none is."""

    base: float
    loss: float
    margin: float
    rows: int
    points: list[Point] = field(default_factory=list)

    @property
    def smallest(self) -> int | None:
        fitting = [point.rank for point in self.points if point.above <= self.margin]
        return min(fitting, default=None)


def rank_curve(
    trained: Trained, name: str, found: Mapping[str, Change], rows: Rows, ranks: list[int] | None, margin: float
) -> Curve:
    """Look at ``rows`` by the base, the run's adapter, and it cut to each of ``ranks`` (None: 1, 2, 4, … its own)."""
    model = trained.model
    assert isinstance(model, LoraModel)
    asked = sorted(set(ranks)) if ranks else powers_of_two(own_rank(model, name))
    batches = rows.batches(trained.config.train.micro_batch_size)
    with Steps(f"{name} rank", len(batches) * (len(asked) + 2)) as bar:
        look = Look(trained, rows.kind, batches, bar)
        base, own = look.alone(BASE), look.alone(name)
        points = [_point(rank, _cut(look, model, name, rank, found), own, found) for rank in asked]
    return Curve(mean_loss(base.sums), mean_loss(own.sums), margin, rows.count, points)


def own_rank(model: LoraModel, name: str) -> int:
    """The run's largest rank."""
    config = model.configs[name]
    return max([config.rank, *(config.rank_pattern or {}).values()])


def cut_name(name: str, rank: int) -> str:
    return f"{name}-cut-to-{rank}"


def _cut(look: Look, model: LoraModel, name: str, rank: int, found: Mapping[str, Change]) -> Seen:
    """By the adapter cut to ``rank``, which stands beside the run's for that long."""
    trained, cut = look.trained, cut_name(name, rank)
    add_shrunk(model, name, cut, rank, found)
    model.eval()
    trained.runs[cut] = trained.runs[name]
    try:
        return look.alone(cut)
    finally:
        del trained.runs[cut]
        model.delete_adapter(cut)


def _point(rank: int, seen: Seen, own: Seen, found: Mapping[str, Change]) -> Point:
    difference = (seen.losses - own.losses).double()
    error = float(difference.std() / len(difference) ** 0.5) if len(difference) > 1 else 0.0
    loss = mean_loss(seen.sums)
    return Point(rank, loss, loss - mean_loss(own.sums), error, _kept(rank, found))


def _kept(rank: int, found: Mapping[str, Change]) -> float:
    squares = [change.S.double().square() for change in found.values()]
    total = torch.stack([each.sum() for each in squares]).sum()
    return float(torch.stack([each[:rank].sum() for each in squares]).sum() / total) if total else 1.0
