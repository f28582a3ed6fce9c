"""The benchmark that holds one run's rank curve against a sweep: of a sweep's own jobs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import rank_curve


def test_a_sweeps_largest_rank_is_cut_for_each_seed(
    tmp_path: Path, made_up: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_up.sweep(tmp_path, swept={"rank": [4, 2, 8], "seed": [0, 1]}, failing=(3,))  # rank 2 of seed 1
    asked = []

    def analysed(task: str, run: str, ranks: str, *_: str) -> None:
        asked.append((Path(run.removeprefix("run=")).name, ranks))
        place = Path(run.removeprefix("run=")) / "analyse"
        place.mkdir()
        lines = [f"{rank},{4 - rank / 10}" for rank in (2, 4, 8)]
        (place / "rank_curve.csv").write_text("\n".join(["rank,loss", *lines]) + "\n")

    monkeypatch.setattr(rank_curve, "_run", analysed)
    first, second = rank_curve.of_sweep(folder)
    assert asked == [("4", "analyse.ranks=[2,4,8]"), ("5", "analyse.ranks=[4,8]")]
    assert (first.seed, list(first.swept), list(second.swept)) == (0, [2, 4, 8], [4, 8])
    assert first.difference(4) == pytest.approx(3.6 - made_up.loss_of({"rank": 4, "seed": 0}))
    told = rank_curve.told([first], 0.01, "made up")
    assert "They agree in" in told


def test_a_folder_without_such_jobs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no finished jobs of a sweep over ranks"):
        rank_curve.of_sweep(tmp_path)
