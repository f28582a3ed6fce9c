"""Command lines in forked processes, each with a fault that is aimed at one call inside it."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import read_metrics

CLOCK = ("_per_s", "train/mfu")  # how the names of its metrics end
FORKED = Path(__file__).with_name("forked.py")


@dataclass(frozen=True)
class Ended:
    """How a forked command line ended, and the folder it stood in."""

    code: Any  # a list of those of several processes
    out: str
    err: str
    folder: Path

    def runs(self) -> list[Any]:
        """Every run in its database."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        experiment = client.get_experiment_by_name("lora_exp")
        return [] if experiment is None else list(client.search_runs([experiment.experiment_id]))

    def statuses(self) -> list[str]:
        """Their statuses, sorted."""
        return sorted(run.info.status for run in self.runs())

    def earned(self, job: str = "outputs/job") -> tuple[dict[str, bytes], list[dict[str, float]]]:
        """The files of a job's adapter, and its metrics but those of the clock."""
        place = self.folder / job
        files = {path.name: path.read_bytes() for path in sorted((place / "adapter").glob("*"))}
        return files, [
            {name: value for name, value in record.items() if not name.endswith(CLOCK)}
            for record in read_metrics(place)
        ]

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """What the one run that is FINISHED has learnt by step, as the database has it."""
        from mlflow.tracking import MlflowClient

        client = MlflowClient(f"sqlite:///{self.folder}/outputs/mlflow.db")
        (run,) = (run for run in self.runs() if run.info.status == "FINISHED")
        names = [name for name in run.data.metrics if name.startswith(("train/", "eval/")) and not name.endswith(CLOCK)]
        histories = {name: client.get_metric_history(run.info.run_id, name) for name in names}
        return {name: sorted((point.step, point.value) for point in found) for name, found in histories.items()}


@pytest.fixture(scope="session")
def forking() -> Iterator[subprocess.Popen[str]]:
    """The process that forks; it has imported everything once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, str(FORKED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def forked(forking: subprocess.Popen[str], workplace: Path, empty_database: Path) -> Callable[..., Ended]:
    """Call ``lora-exp`` in a forked process, in a folder of its own or in ``folder``."""
    made = 0

    def call(
        *arguments: str, folder: Path | None = None, terminal: Path | None = None, has_database: bool = True,
        environment: dict[str, str] | None = None, **aim: Any,
    ) -> Ended:  # fmt: skip
        nonlocal made
        made += 1
        place = folder or workplace / f"call{made}"
        (place / "outputs").mkdir(parents=True, exist_ok=True)
        if has_database and not (place / "outputs/mlflow.db").exists():
            shutil.copy(empty_database, place / "outputs/mlflow.db")
        shown = terminal or place
        order = {
            "arguments": arguments,
            "folder": str(place),
            "terminal": str(shown),
            "environment": environment or {},
            **aim,
        }
        order["environment"].setdefault("LORA_EXP_CACHE", str(workplace / "cache"))
        return _sent(forking, order, place, shown)

    return call


def _sent(forking: subprocess.Popen[str], order: dict[str, Any], place: Path, shown: Path) -> Ended:
    assert forking.stdin is not None
    assert forking.stdout is not None
    forking.stdin.write(json.dumps(order) + "\n")
    forking.stdin.flush()
    if "processes" not in order:
        forking.stdout.readline()
    code = json.loads(forking.stdout.readline())["code"]
    return Ended(code, (shown / "out").read_text(), (shown / "err").read_text(), place)


@pytest.fixture
def fake_server(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Start a tracking server that may ask for a login, or go away at a call."""
    started: list[Any] = []
    build = runpy.run_path(str(FORKED.with_name("fake_server.py")))["FakeServer"]

    def start(**how: Any) -> Any:
        started.append(build(tmp_path / "server", **how))
        return started[-1]

    yield start
    for server in started:
        server.close()
