"""The comparison of a sweep."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import Outcome, Result, write_outcome
from lora_exp.sweep.report import RESULT_COLUMNS, collect, differing, fitting, report_sweep


def add(folder: Path, number: int, loss: float | None, **values: Any) -> None:
    place = folder / str(number)
    place.mkdir(parents=True)
    result = None
    if loss is not None:
        result = Result(loss, 3.0, {"perplexity": 20.0}, 1000 * number + 1, 10**6, 4096, 0.5, 12.0, "adapter", None)
        (place / "metrics.jsonl").write_text('{"lane": "default", "step": 0, "eval/loss": 3.0}\n{"lane": "cut')
    status = "FINISHED" if result else "FAILED"
    error = None if result else "rank=0 is below 1:\nuse 8 | or more"
    write_outcome(place, Outcome(number, status, [], {"seed": 0, "model": "m", **values}, result, error))


def test_best_first_failed_last_and_only_what_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    add(tmp_path, 0, 2.5, rank=8, scale=5.6)
    add(tmp_path, 1, 2.1, rank=64, scale=2.0)
    add(tmp_path, 2, None, rank=0)
    jobs = collect(tmp_path)
    assert [job.outcome.number for job in jobs] == [1, 0, 2]
    assert differing(jobs) == ["rank"]
    assert report_sweep(tmp_path, interrupted=False) is False
    rows = list(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert [row["rank"] for row in rows] == ["64", "8", "0"]
    assert rows[0]["eval/loss"] == "2.1000"
    assert rows[2]["status"].startswith("FAILED: rank=0 is below 1: use 8")
    assert "\\|" in (tmp_path / "comparison.md").read_text()
    assert "Sweep, best first" in capsys.readouterr().out
    pictures = {file.name for file in tmp_path.glob("*.png")}
    assert pictures == {"loss_curves.png", "loss_against_rank.png", "loss_against_parameters.png"}


def test_a_job_without_factors_has_no_other_rank(tmp_path: Path) -> None:
    add(tmp_path, 0, 2.5, adapter="lora", rank=8, alpha=16)
    add(tmp_path, 1, 2.1, adapter="head")
    assert differing(collect(tmp_path)) == ["adapter"]
    add(tmp_path, 2, 2.2, adapter="lora", rank=16, alpha=16)
    assert differing(collect(tmp_path)) == ["adapter", "rank"]


def test_a_sweep_of_failures_is_still_reported(tmp_path: Path) -> None:
    add(tmp_path, 0, None, rank=0)
    assert report_sweep(tmp_path, interrupted=False) is False
    assert (tmp_path / "comparison.md").exists()


def test_a_finished_sweep_counts_as_finished_unless_interrupted(tmp_path: Path) -> None:
    add(tmp_path, 0, 2.0, rank=8)
    add(tmp_path, 1, 2.0, rank=9)
    assert report_sweep(tmp_path, interrupted=False)
    assert not report_sweep(tmp_path, interrupted=True)


@pytest.mark.parametrize(("width", "left_out"), [(140, 0), (100, 1), (80, 3), (60, 4)])
def test_a_narrow_terminal_keeps_what_was_swept_the_result_and_the_status(width: int, left_out: int) -> None:
    loss, *others = RESULT_COLUMNS
    header = ["job", "rank", "adapter", loss, "perplexity", *others, "status"]
    row = ["3", "4", "dora", "3.6021", "36.68", "1,376,640", "538.1", "5.59", "7", "FINISHED"]
    columns, (shown,) = fitting(header, [row], width)
    assert len(header) - len(columns) == left_out
    assert {"job", "rank", "adapter", "eval/loss", "status"} <= set(columns)
    assert shown == [value for name, value in zip(header, row, strict=True) if name in columns]
    assert sum(3 + max(len(name), len(value)) for name, value in zip(columns, shown, strict=True)) + 1 <= width
