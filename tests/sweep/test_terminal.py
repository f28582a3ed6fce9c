"""The table in terminals of every width."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lora_exp.sweep import terminal
from lora_exp.sweep.table import RESULT_COLUMNS, Table

LOSS, *SIZES = RESULT_COLUMNS
RESULTS = [LOSS, "accuracy", *SIZES]
FAILED = "FAILED: eval/loss became nan at optimizer step 13 (lane default): lower optimizer.lr"
LONG = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
TABLE = Table(
    ["rank", "adapter", "optimizer.lr"],
    RESULTS,
    [
        ["3", "64", "dora", "0.0003", "3.6021", "0.9168", "1,376,640", "538.1", "5.59", "7", "FINISHED"],
        ["11", "128", "lora", "0.0123457", "", "", "", "", "", "", FAILED],
    ],
)
TARGETS = Table(["targets"], RESULTS, [["0", LONG, "2.1000", "0.9", "1,000", "5", "1", "7", "FINISHED"]])


def printed(table: Table, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    stream = StringIO()
    console = Console(file=stream, width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(terminal, "Console", lambda **_: console)
    terminal.show(table)
    return stream.getvalue()


@pytest.mark.parametrize("width", [140, 100, 80, 66])
def test_what_was_swept_the_result_and_the_status_are_whole(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printed(TABLE, width, monkeypatch)
    lines = shown.splitlines()
    assert max(map(len, lines)) <= width
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert cells[0][:5] == ["3", "64", "dora", "0.0003", "3.6021"]
    assert cells[1][:5] == ["11", "128", "lora", "0.0123457", ""]
    assert cells[0][-1] == "FINISHED"
    assert " ".join(row[-1] for row in cells[1:]) == FAILED


def test_sizes_and_times_go_before_metrics() -> None:
    kept = {width: [column.name for column in terminal.fitting(TABLE, width)] for width in range(200, 61, -1)}
    left_out = [name for width in kept for name in RESULTS if name not in kept[width]]
    assert list(dict.fromkeys(left_out)) == ["wall s", "base MB", "adapter MB", "trainable", "accuracy"]
    assert kept[200] == TABLE.header
    assert kept[62] == ["job", "rank", "adapter", "optimizer.lr", "eval/loss", "status"]


def test_headers_break_only_where_there_is_no_room() -> None:
    assert {column.header for column in terminal.fitting(TABLE, 200)} >= {"optimizer.lr", "eval/loss"}
    assert {column.header for column in terminal.fitting(TABLE, 80)} >= {"optimizer.\nlr", "eval/\nloss"}


def test_a_long_value_is_broken_and_nothing_of_it_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = printed(TARGETS, 60, monkeypatch).splitlines()
    assert max(map(len, lines)) <= 60
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]
    assert "".join(row[1] for row in cells) == LONG


def test_without_any_room_it_is_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = printed(TABLE, 40, monkeypatch)
    assert "job 3: rank=64  adapter=dora  optimizer.lr=0.0003  eval/loss=3.6021  FINISHED" in shown
    assert FAILED in shown
