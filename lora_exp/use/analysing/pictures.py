"""An analysis as PNG files."""

from __future__ import annotations

import re
from pathlib import Path

from torch import Tensor

from lora_exp.plots import COLOURS, blank
from lora_exp.use.analysing.curve import Curve
from lora_exp.use.analysing.spectrum import LayerFigures

_MOST_NAMED = 8


def draw_spectra(layers: list[LayerFigures], file: Path) -> Path:
    """Singular values by place, a line a layer, in the colour of the layer's own name in its block."""
    figure, axes = blank("singular values of each layer's change", "place", "singular value")
    kinds = list(dict.fromkeys(_kind(layer.layer) for layer in layers))
    said: set[str] = set()
    for layer in layers:
        kind = _kind(layer.layer)
        label = None if kind in said or len(said) >= _MOST_NAMED else kind
        said.add(kind)
        colour = COLOURS[kinds.index(kind) % len(COLOURS)]
        values = [value for value in layer.spectrum if value > 0]
        axes.plot(range(1, len(values) + 1), values, color=colour, alpha=0.5, linewidth=1, label=label)
    axes.set_yscale("log")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    return file


def draw_effective_ranks(layers: list[LayerFigures], file: Path) -> Path:
    """Each layer's effective rank, and where they were looked for, its intruders, in the order of the layers."""
    counted = [(place, layer.intruders) for place, layer in enumerate(layers) if layer.intruders is not None]
    figure, axes = blank("effective rank by layer", "layer, from the input on", "effective rank")
    kinds = list(dict.fromkeys(_kind(layer.layer) for layer in layers))
    for number, kind in enumerate(kinds):
        points = [(place, layer.effective_rank) for place, layer in enumerate(layers) if _kind(layer.layer) == kind]
        label = kind if number < _MOST_NAMED else None
        axes.plot(*zip(*points, strict=True), "o", markersize=4, color=COLOURS[number % len(COLOURS)], label=label)
    if any(count for _, count in counted):
        axes.bar(*zip(*counted, strict=True), color="#999999", alpha=0.4, label="intruder dimensions")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(file)
    return file


def draw_curve(curve: Curve, file: Path) -> Path:
    """The loss at each rank with its 95 % interval, the run's own, and the margin above it."""
    figure, axes = blank("loss with each change cut to a rank", "rank", "loss (nats per prediction)")
    ranks = [point.rank for point in curve.points]
    axes.errorbar(
        ranks, [point.loss for point in curve.points], yerr=[1.96 * point.error for point in curve.points],
        color=COLOURS[0], marker="o", capsize=3, label="cut",
    )  # fmt: skip
    axes.axhline(curve.loss, color=COLOURS[1], label="as trained")
    axes.axhline(curve.loss + curve.margin, color=COLOURS[1], linestyle=":", label="with the margin")
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.legend(frameon=False)
    figure.savefig(file)
    return file


def draw_overlap(similarities: Tensor, one: str, other: str, file: Path) -> Path:
    """φ(i, j) of two runs, as a map."""
    title = f"directions shared by {one} and {other}"
    figure, axes = blank(title, f"first j of {other}", f"first i of {one}", 5.2, 4.6)
    i, j = similarities.shape
    shown = axes.imshow(similarities.numpy(), origin="lower", vmin=0, vmax=1, extent=(0.5, j + 0.5, 0.5, i + 0.5))
    axes.grid(False)
    figure.colorbar(shown, ax=axes, label="0: none, 1: all")
    figure.savefig(file)
    return file


def _kind(layer: str) -> str:
    """What a layer is called in each block: the last of its name."""
    named = [part for part in layer.split(".") if not re.fullmatch(r"\d+", part)]
    return named[-1] if named else layer
