"""A sweep's pictures and its page."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure as Canvas

from lora_exp.sweep import interactive, pictures
from lora_exp.sweep.jobs import collect
from lora_exp.sweep.report import figures_of, report_sweep

SWEEPS = {
    "24 jobs": {"rank": [4, 8, 16, 32], "adapter": ["lora", "dora"], "optimizer.lr": [1e-4, 1e-3, 1e-2]},
    "60 jobs": {
        "rank": [1, 2, 4, 8, 16],
        "dropout": [0.0, 0.1, 0.2],
        "adapter": ["lora", "dora"],
        "bias": ["a$", "$b_"],
    },
    "long names": {"targets": [["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"]], "rank": [4, 8]},
    "seeds": {"adapter": ["lora", "dora"], "seed": [0, 1, 2]},
}


@pytest.mark.parametrize("name", SWEEPS)
def test_no_plot_is_squeezed_and_no_legend_loses_or_repeats_a_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made_up: Any
) -> None:
    saved: dict[str, Canvas] = {}
    save = Canvas.savefig

    def keep(canvas: Canvas, path: Path) -> None:
        save(canvas, path)
        saved[path.name] = canvas

    monkeypatch.setattr(Canvas, "savefig", keep)
    made_up.sweep(tmp_path, swept=SWEEPS[name], failing=(1,))
    report_sweep(tmp_path, interrupted=False)
    assert set(saved) == {file.name for file in tmp_path.glob("*.png")}
    for canvas in saved.values():
        (axes,) = canvas.axes
        frame = axes.get_window_extent()
        assert frame.width / canvas.dpi > 5
        assert frame.height / canvas.dpi > 2.4
        for legend in canvas.legends:
            box = legend.get_window_extent()
            assert box.x0 >= frame.x1
            assert box.y0 >= 0
            assert box.x1 <= canvas.bbox.x1
            lines = legend.get_lines()
            looks = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in lines}
            assert len(looks) == len(lines) == len({text.get_text() for text in legend.get_texts()})


def test_the_styles_of_both_are_as_many_as_a_legend_names() -> None:
    for style in (pictures._style, interactive._style):
        assert len({str(style(index)) for index in range(32)}) == 32


class Reader(HTMLParser):
    """What a browser would fetch, and the cells of the table."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.cells: list[str] = []
        self._is_cell = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for key, value in attrs if key in ("src", "href")]
        self._is_cell = tag in ("td", "th")
        if self._is_cell:
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._is_cell = False

    def handle_data(self, data: str) -> None:
        if self._is_cell:
            self.cells[-1] += data


def test_the_page_stands_alone_and_has_everything(tmp_path: Path, made_up: Any) -> None:
    made_up.sweep(tmp_path, swept=SWEEPS["24 jobs"], failing=(5,), accuracy=True)
    report_sweep(tmp_path, interrupted=False)
    page = (tmp_path / "report.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert reader.fetched == []
    assert reader.cells[:6] == ["job", "rank", "adapter", "optimizer.lr", "eval/loss", "perplexity"]
    (failed,) = [cell for cell in reader.cells if cell.startswith("FAILED")]
    assert failed.endswith("lower optimizer.lr | it is <b>high</b>")
    assert page.count("Plotly.newPlot(") == len(list(tmp_path.glob("*.png")))
    headings = [html.unescape(found) for found in re.findall(r"<h2>(.*?)</h2>", page)]
    assert {"validation loss", "validation accuracy", "validation loss against rank"} <= set(headings)
    assert "validation loss against optimizer.lr" in headings
    assert headings[-1] == "validation accuracy of every combination"


def test_plotly_and_the_picture_show_the_same_points(tmp_path: Path, made_up: Any) -> None:
    jobs = collect(made_up.sweep(tmp_path, swept=SWEEPS["seeds"]))
    figures, _ = figures_of(jobs, ["adapter", "seed"])
    (figure,) = [each for each in figures if each.name == "loss_against_adapter"]
    (trace,) = interactive.interactive(figure).data
    points = figure.series[0].points
    assert list(trace.x) == ["lora", "dora"]
    assert [y - low for y, low in zip(trace.y, trace.error_y.arrayminus, strict=True)] == pytest.approx(
        [point.low for point in points]
    )
    assert [y + high for y, high in zip(trace.y, trace.error_y.array, strict=True)] == pytest.approx(
        [point.high for point in points]
    )
