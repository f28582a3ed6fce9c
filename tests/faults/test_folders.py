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
