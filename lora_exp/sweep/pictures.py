"""A sweep's figures as PNG files."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import LogLocator, NullLocator

from lora_exp.plots import COLOURS, blank
from lora_exp.sweep.axes import Axis
from lora_exp.sweep.figures import Figure, Point, Series
from lora_exp.sweep.parallel import Dimension, Parallel

_DASHES: tuple[Any, ...] = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D")
_GREY = "#b0b0b0"
_LEGEND_LINE, _LEGEND_CHARACTER = 0.19, 0.075  # inches
_LABEL, _NOTE = 60, 110  # characters


def draw(figure: Figure, path: Path) -> None:
    """One picture. Its legend stands beside the plot, which it takes no room from."""
    labels = [each.label for each in figure.series if each.label]
    labels = [_short(label) for label in dict.fromkeys(labels)]
    beside = 0.6 + _LEGEND_CHARACTER * max(map(len, labels)) if labels else 0.0
    height = max(4.2, 0.8 + _LEGEND_LINE * len(labels))
    canvas, axes = blank(figure.title, figure.x.label, figure.y.label, 7 + beside, height)
    named = [each for each in figure.series if not each.muted]
    for each in figure.series:
        style = _style(named.index(each)) if each in named else _MUTED
        _draw_series(axes, figure.x, each, style)
    _draw_front(axes, figure.front)
    _set_axis(axes, figure.x)
    if figure.frame is not None:
        axes.set_ylim(*figure.frame)
    if figure.told:
        note = textwrap.fill(figure.told, _NOTE)
        said = axes.annotate(note, (0, 1), (0, 3), "axes fraction", "offset points", fontsize=7, color="#606060")
        said.set_in_layout(False)  # it would take its width from the plot
        axes.set_title(figure.title, loc="left", pad=6 + 9 * len(note.splitlines()), parse_math=False)
    _set_legend(canvas, axes)
    canvas.savefig(path)


def draw_parallel(parallel: Parallel, path: Path) -> None:
    """One picture: a line a job, darker the better it did; the best one stands out."""
    canvas, axes = blank(parallel.title, "", "", max(7, 1.9 * len(parallel.dimensions)), 4.4)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    columns = [_scaled(dimension) for dimension in parallel.dimensions]
    outcome = parallel.dimensions[-1].positions
    colours = matplotlib.colormaps["viridis" if not parallel.higher_is_better else "viridis_r"]
    norm = Normalize(min(outcome), max(outcome))
    best = (max if parallel.higher_is_better else min)(range(len(outcome)), key=outcome.__getitem__)
    for index, value in enumerate(outcome):
        heights = [column[index] for column in columns]
        is_best = index == best
        axes.plot(
            range(len(heights)), heights, color=COLOURS[1] if is_best else colours(norm(value)),
            linewidth=2.6 if is_best else 1.1, alpha=1 if is_best else 0.7, zorder=3 if is_best else 2,
        )  # fmt: skip
    for at, dimension in enumerate(parallel.dimensions):
        _draw_upright(axes, at, dimension)
    axes.set_xticks(range(len(columns)), [textwrap.fill(d.label, 20) for d in parallel.dimensions])
    axes.set_yticks([])
    axes.set_title(f"{parallel.title}; in red the best: {_short(parallel.notes[best])}", loc="left", fontsize=9)
    axes.set_xlim(-0.15, len(columns) - 0.6)
    canvas.savefig(path)


_MUTED = {"color": _GREY, "linestyle": "-", "marker": "o", "linewidth": 0.8, "markersize": 3, "zorder": 1}


def _style(index: int) -> dict[str, Any]:
    """No two of 32 look the same."""
    turn = index // len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)], "linestyle": _DASHES[turn % len(_DASHES)],
        "marker": _MARKERS[turn % len(_MARKERS)], "linewidth": 1.7, "markersize": 5, "zorder": 2,
    }  # fmt: skip


def _draw_series(axes: Axes, x: Axis, series: Series, style: dict[str, Any]) -> None:
    places = [x.order(point.x) for point in series.points]
    values = [point.y for point in series.points]
    line = style if series.joined else {**style, "linestyle": "none"}
    axes.plot(places, values, label=_short(series.label) or None, **line)
    spans = [(place, point) for place, point in zip(places, series.points, strict=True) if point.low is not None]
    if spans:
        below = [point.y - (point.low or 0) for _, point in spans]
        above = [(point.high or 0) - point.y for _, point in spans]
        at = [place for place, _ in spans]
        axes.errorbar(
            at, [point.y for _, point in spans], [below, above], fmt="none", ecolor=style["color"], capsize=3,
            elinewidth=1.1,
        )  # fmt: skip


def _draw_front(axes: Axes, front: list[Point]) -> None:
    if not front:
        return
    places, values = [point.x for point in front], [point.y for point in front]
    axes.step(places, values, where="post", color="#303030", linewidth=1, linestyle=":")
    for point in front:
        number = " ".join(point.note.split()[:2])
        axes.annotate(number, (float(point.x), point.y), (4, 4), textcoords="offset points", fontsize=7)


def _set_axis(axes: Axes, x: Axis) -> None:
    if x.categories:
        long = max(map(len, x.categories)) * len(x.categories) > 70
        names = [textwrap.fill(name.replace(",", ", "), 24) for name in x.categories]
        axes.set_xticks(range(len(names)), names, rotation=30 if long else 0, ha="right" if long else "center")
        axes.margins(x=0.5 / max(len(names), 2))
        return
    if x.is_log:
        axes.set_xscale("log")
        low, high = axes.get_xlim()
        # Decades alone would be no scale for two of them.
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)) if high < 100 * low else NullLocator())
        axes.xaxis.set_minor_formatter(_number)
    axes.xaxis.set_major_formatter(_number)
    if x.ticks:
        axes.set_xticks(x.ticks, [f"{tick:g}" for tick in x.ticks])
        axes.xaxis.set_minor_locator(NullLocator())


def _number(value: float, _: object = None) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def _set_legend(canvas: Canvas, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    if not once:
        return
    legend = canvas.legend(
        once.values(), once.keys(), loc="outside right upper", frameon=False, fontsize=8, handlelength=3
    )
    for line in legend.get_texts():
        line.set_parse_math(False)


def _draw_upright(axes: Axes, at: int, dimension: Dimension) -> None:
    axes.axvline(at, color="#303030", linewidth=0.9, zorder=4)
    for height, name in zip(_scaled(dimension, list(dimension.ticks)), dimension.ticks.values(), strict=True):
        axes.annotate(
            _short(name, 22), (at, height), (4, 0), textcoords="offset points", fontsize=7, va="center", zorder=5,
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )  # fmt: skip


def _scaled(dimension: Dimension, positions: list[float] | None = None) -> list[float]:
    """Positions between 0 and 1."""
    every = [*dimension.positions, *dimension.ticks]
    low, high = min(every), max(every)
    chosen = dimension.positions if positions is None else positions
    return [(position - low) / (high - low) if high > low else 0.5 for position in chosen]


def _short(label: str, most: int = _LABEL) -> str:
    return label if len(label) <= most else f"{label[: most - 1]}…"
