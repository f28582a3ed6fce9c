"""A sweep's figures for a browser."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as plotly

from lora_exp.plots import COLOURS
from lora_exp.sweep.axes import Axis
from lora_exp.sweep.figures import Figure, Point, Series
from lora_exp.sweep.parallel import Parallel

_DASHES, _MARKERS = ("solid", "dash", "dot", "dashdot"), ("circle", "square", "triangle-up", "diamond")
_GREY = "#b0b0b0"
_LEGEND_LINE = 22  # pixels


def interactive(figure: Figure) -> plotly.Figure:
    """Zoomed, hovered over, its lines switched off and on by their names."""
    drawn = plotly.Figure(layout=_layout(figure))
    named = [each for each in figure.series if not each.muted]
    seen: set[str] = set()
    for each in figure.series:
        style = _style(named.index(each)) if each in named else _MUTED
        drawn.add_trace(_trace(figure.x, each, style, is_first=each.label not in seen))
        seen.add(each.label)
    if figure.front:
        drawn.add_trace(_front(figure.front))
    return drawn


def interactive_parallel(parallel: Parallel) -> plotly.Figure:
    """A line a job; dragging along an axis picks jobs."""
    outcome = parallel.dimensions[-1]
    dimensions = [
        {
            "label": each.label,
            "values": each.positions,
            "tickvals": list(each.ticks),
            "ticktext": [*each.ticks.values()],
        }
        for each in parallel.dimensions
    ]
    line = {"color": outcome.positions, "colorscale": "Viridis", "reversescale": parallel.higher_is_better}
    drawn = plotly.Figure(plotly.Parcoords(dimensions=dimensions, line=line))
    drawn.update_layout(height=460, margin={"l": 90, "r": 90, "t": 60, "b": 30}, font={"size": 13})
    return drawn


_MUTED = {"line": {"color": _GREY, "width": 1}, "marker": {"color": _GREY, "size": 4}}


def _style(index: int) -> dict[str, Any]:
    """No two of 32 look the same."""
    colour, turn = COLOURS[index % len(COLOURS)], index // len(COLOURS) % len(_DASHES)
    return {
        "line": {"color": colour, "dash": _DASHES[turn], "width": 2},
        "marker": {"color": colour, "symbol": _MARKERS[turn], "size": 8},
    }


def _trace(x: Axis, series: Series, style: dict[str, Any], is_first: bool) -> plotly.Scatter:
    spread = None
    if any(point.low is not None for point in series.points):
        spread = {
            "type": "data", "symmetric": False,
            "array": [(point.high or point.y) - point.y if point.low is not None else 0 for point in series.points],
            "arrayminus": [point.y - point.low if point.low is not None else 0 for point in series.points],
        }  # fmt: skip
    return plotly.Scatter(
        x=[point.x for point in series.points], y=[point.y for point in series.points], error_y=spread,
        mode="lines+markers" if series.joined else "markers", name=series.label, legendgroup=series.label,
        showlegend=bool(series.label) and is_first, text=[point.note for point in series.points],
        hovertemplate="%{text}<br>%{x}: %{y:.4f}<extra></extra>", **style,
    )  # fmt: skip


def _front(front: list[Point]) -> plotly.Scatter:
    return plotly.Scatter(
        x=[point.x for point in front], y=[point.y for point in front], mode="lines+text", showlegend=False,
        line={"shape": "hv", "dash": "dot", "color": "#303030", "width": 1.5}, hoverinfo="skip",
        text=["\u00a0\u00a0" + " ".join(point.note.split()[:2]) for point in front], textposition="top right",
        textfont={"size": 10}, cliponaxis=False,
    )  # fmt: skip


def _layout(figure: Figure) -> dict[str, Any]:
    entries = len({each.label for each in figure.series})
    return {
        "template": "plotly_white", "height": max(420, 130 + _LEGEND_LINE * entries), "hovermode": "closest",
        "margin": {"l": 70, "r": 20, "t": 20, "b": 60}, "legend": {"x": 1.02, "y": 1, "tracegroupgap": 0},
        "xaxis": {"title": {"text": figure.x.label}, **_scale(figure.x)},
        "yaxis": {"title": {"text": figure.y.label}} | ({"range": list(figure.frame)} if figure.frame else {}),
    }  # fmt: skip


def _scale(axis: Axis) -> dict[str, Any]:
    if axis.categories:
        return {"type": "category", "categoryorder": "array", "categoryarray": axis.categories}
    ticks = {"tickvals": axis.ticks, "ticktext": [f"{tick:g}" for tick in axis.ticks]} if axis.ticks else {}
    return {"type": "log" if axis.is_log else "linear", "tickformat": ",~r", **ticks}
