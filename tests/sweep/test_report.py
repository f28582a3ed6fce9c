"""The end of a sweep: its comparison beside the jobs."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import Outcome, Result, write_outcome
from lora_exp.sweep.jobs import collect, differing
from lora_exp.sweep.report import report_sweep


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
    assert (tmp_path / "report.html").exists()


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
    assert "rank=0 is below 1: use 8 | or more" in (tmp_path / "report.html").read_text()


def test_a_finished_sweep_counts_as_finished_unless_interrupted(tmp_path: Path) -> None:
    add(tmp_path, 0, 2.0, rank=8)
    add(tmp_path, 1, 2.0, rank=9)
    assert report_sweep(tmp_path, interrupted=False)
    assert not report_sweep(tmp_path, interrupted=True)


def test_a_list_keeps_its_commas_and_a_number_loses_them(tmp_path: Path) -> None:
    add(tmp_path, 1, 2.0, targets=["q_proj", "v_proj"])
    add(tmp_path, 2, 2.1, targets=["q_proj"])
    report_sweep(tmp_path, interrupted=False)
    row = next(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    assert (row["targets"], row["trainable"]) == ("q_proj,v_proj", "1001")


def test_what_hinders_drawing_costs_nobody_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(tmp_path, 0, 2.0, rank=8)
    monkeypatch.setattr("lora_exp.sweep.report._draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report_sweep(tmp_path, interrupted=False)
    assert "2.0000" in (tmp_path / "comparison.csv").read_text()


def test_every_loss_is_told_as_exactly_as_the_validation_loss(tmp_path: Path) -> None:
    add(tmp_path, 0, 3.35912345, rank=8)
    file = tmp_path / "0/result.json"
    outcome = json.loads(file.read_text())
    outcome["result"] |= {"test": {"loss": 3.36181, "perplexity": 28.8412}, "metrics": {"forget_loss": 4.00051}}
    file.write_text(json.dumps(outcome))
    report_sweep(tmp_path, interrupted=False)
    row = next(csv.DictReader((tmp_path / "comparison.csv").read_text().splitlines()))
    found = [row[name] for name in ("eval/loss", "test/loss", "forget_loss", "test/perplexity")]
    assert found == ["3.3591", "3.3618", "4.0005", "28.84"]


def test_replicates_that_are_equal_are_drawn(tmp_path: Path) -> None:
    """Their mean, rounded, may lie beside them, and matplotlib refuses a bar of a negative length."""
    loss = next(x / 1e4 for x in range(30000, 40000) if sum([x / 1e4] * 3) / 3 < x / 1e4)
    for number in range(6):
        add(tmp_path, number, loss, rank=(4, 8)[number // 3], seed=number % 3)
    assert report_sweep(tmp_path, interrupted=False)
    assert (tmp_path / "loss_against_rank.png").is_file()
    assert (tmp_path / "report.html").is_file()
