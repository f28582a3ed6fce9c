"""Pictures as PNG files: how every one of them looks, and the one of a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
COLOURS = ("#1f6f8b", "#d1495b", "#3a7d44", "#8e5ea2", "#b8860b", "#4d4d4d", "#2f9fd0", "#f2845c")


def loss_curve(train: Points, evaluation: Points, path: Path) -> None:
    """Training loss and evaluation loss (nats a prediction) over optimizer steps."""
    figure, axes = blank("loss", "optimizer step", "loss (nats per prediction)")
    axes.plot(*_columns(train), color=COLOURS[0], alpha=0.45, linewidth=1.2, label="train")
    axes.plot(*_columns(evaluation), color=COLOURS[1], marker="o", linewidth=1.8, label="validation")
    axes.legend(frameon=False)
    figure.savefig(path)


def blank(title: str, x: str, y: str, width: float = 7, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of so many inches with nothing in it yet. Its texts are as they are: ``$`` begins no formula."""
    figure = Figure(figsize=(width, height), dpi=130, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, loc="left", parse_math=False)
    axes.set_xlabel(x, parse_math=False)
    axes.set_ylabel(y, parse_math=False)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _columns(points: Points) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]
