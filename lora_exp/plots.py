"""Pictures of one run and of a sweep, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
_COLOURS = ("#1f6f8b", "#d1495b", "#3a7d44", "#8e5ea2", "#b8860b", "#4d4d4d", "#2f4b7c", "#f95d6a")


def loss_curve(train: Points, evaluation: Points, path: Path) -> None:
    """Training loss and evaluation loss (nats a prediction) over optimizer steps."""
    figure, axes = _figure("loss", "optimizer step", "loss (nats per prediction)")
    axes.plot(*_columns(train), color=_COLOURS[0], alpha=0.45, linewidth=1.2, label="train")
    axes.plot(*_columns(evaluation), color=_COLOURS[1], marker="o", linewidth=1.8, label="validation")
    axes.legend(frameon=False)
    figure.savefig(path)


def loss_curves(curves: Mapping[str, Points], path: Path) -> None:
    """One validation curve a job."""
    figure, axes = _figure("validation loss", "optimizer step", "loss (nats per prediction)")
    for index, (label, points) in enumerate(curves.items()):
        axes.plot(*_columns(points), color=_COLOURS[index % len(_COLOURS)], marker="o", label=label)
    axes.legend(frameon=False, fontsize=8, ncols=1 + len(curves) // 12)
    figure.savefig(path)


def final_loss(groups: Mapping[str, Points], against: str, path: Path) -> None:
    """Final validation loss against ``against`` (log scale), one line a group of jobs."""
    figure, axes = _figure(f"final validation loss against {against}", against, "loss (nats per prediction)")
    for index, (label, points) in enumerate(groups.items()):
        axes.plot(*_columns(sorted(points)), color=_COLOURS[index % len(_COLOURS)], marker="o", label=label or None)
    axes.set_xscale("log", base=2 if against == "rank" else 10)
    if against == "rank":
        ranks = sorted({x for points in groups.values() for x, _ in points})
        axes.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    if any(groups):
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path)


def _figure(title: str, x: str, y: str):  # type: ignore[no-untyped-def]
    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set(title=title, xlabel=x, ylabel=y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
