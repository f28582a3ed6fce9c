"""Where a job's files land, and whose they are."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Forked = Callable[..., Any]


@pytest.mark.parametrize("name", ["what?", "25%20", pytest.param("a # b ü?x=1", marks=pytest.mark.slow)])
def test_any_folder_can_be_stood_in(name: str, forked: Forked, tiny_overrides: list[str], workplace: Path) -> None:
    folder = workplace / name
    done = forked(*tiny_overrides, folder=folder, has_database=False)
    assert done.code == 0, done.err
    with sqlite3.connect(folder / "outputs/mlflow.db") as connection:
        assert connection.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)]
    connection.close()
    assert list(folder.glob("outputs/mlartifacts/*/artifacts/metrics.jsonl"))
    assert {path.name for path in folder.iterdir()} == {"outputs", "out", "err"}
    assert {path.name for path in workplace.iterdir()} <= {name, "cache"}


def test_a_second_job_in_a_folder_is_refused_and_leaves_the_first_alone(
    forked: Forked, tiny_overrides: list[str], workplace: Path
) -> None:
    """Held here as by another process; of the first job's files nothing may change, Hydra's own included."""
    from lora_exp.machine import claims

    folder = workplace / "call"
    first = forked(*tiny_overrides, "hydra.run.dir=outputs/job", "rank=2", folder=folder)
    assert first.code == 0, first.err
    job = folder / "outputs/job"
    with claims.claimed(job, "x"):
        before = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
        second = forked(*tiny_overrides, "hydra.run.dir=outputs/job", "rank=4", folder=folder)
        sweep = forked(*tiny_overrides, "hydra.sweep.dir=outputs/job", "rank=2,4", "-m", folder=folder)
        inner = forked(*tiny_overrides, "hydra.sweep.dir=outputs", "hydra.sweep.subdir=job", "seed=1", "-m",
                       folder=folder)  # fmt: skip
        after = {path: path.read_bytes() for path in job.rglob("*") if path.is_file()}
    for refused, setting in ((second, "hydra.run.dir"), (sweep, "hydra.sweep.dir"), (inner, "hydra.sweep.dir")):
        assert refused.code == 1
        assert f"in use by process {os.getpid()}" in refused.err
        assert f"{setting}=FOLDER" in refused.err
        assert "Traceback" not in refused.err
    changed = {path.relative_to(job) for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert {str(path) for path in changed} <= {f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")}
    again = forked(*tiny_overrides, "hydra.run.dir=outputs/job", "rank=4", folder=folder)
    assert again.code == 0, again.err
