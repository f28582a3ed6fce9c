"""An analysis as files: tables as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from pathlib import Path

from lora_exp.adapters.files.whole import write_text
from lora_exp.use.analysing.curve import Curve
from lora_exp.use.analysing.overlap import Overlap
from lora_exp.use.analysing.spectrum import LayerFigures

_LAYER = (
    "layer", "layer_type", "outputs", "inputs", "norm", "relative", "effective_rank", "stable_rank", "rank_90",
    "rank_99", "intruders",
)  # fmt: skip


def write_layers(layers: list[LayerFigures], folder: Path) -> list[Path]:
    """``layers.csv``, a line a layer, and ``spectra.csv``, a line a singular value."""
    figures = [{name: getattr(layer, name) for name in _LAYER} for layer in layers]
    spectra = (
        {"layer": layer.layer, "place": place, "singular_value": value}
        for layer in layers
        for place, value in enumerate(layer.spectrum, 1)
    )
    return [_write(folder / "layers.csv", figures), _write(folder / "spectra.csv", spectra)]


def write_curve(curve: Curve, folder: Path) -> Path:
    """``rank_curve.csv``, a line a rank; ``above`` is in nats above the run's own loss."""
    return _write(folder / "rank_curve.csv", [vars(point) for point in curve.points])


def write_overlaps(found: list[Overlap], folder: Path) -> Path:
    return _write(folder / "overlap.csv", [vars(each) for each in found])


def _write(file: Path, rows: Iterable[Mapping[str, object]]) -> Path:
    stream, writer = io.StringIO(), None
    for row in rows:
        if writer is None:
            writer = csv.DictWriter(stream, list(row), lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
    write_text(file, stream.getvalue())
    return file
