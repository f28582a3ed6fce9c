"""What kill -9 leaves open is closed by whoever comes next, and by nobody else's."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_exp.machine.process import Process

Forked = Callable[..., Any]
KILLED = {"target": "lora_exp.training.loop:_accumulate", "at": 3, "do": "signal", "signal": int(signal.SIGKILL)}


@pytest.mark.parametrize(
    "sweep", [pytest.param([], id="run"), pytest.param(["rank=2,4", "-m"], id="sweep", marks=pytest.mark.slow)]
)
def test_the_next_command_marks_runs_of_a_process_that_is_gone(
    sweep: list[str], forked: Forked, tiny_overrides: list[str]
) -> None:
    killed = forked(*tiny_overrides, *sweep, **KILLED)
    assert killed.code == -signal.SIGKILL
    assert set(killed.statuses()) == {"RUNNING"}
    done = forked(*tiny_overrides, "rank=2", folder=killed.folder)
    assert done.code == 0, done.err
    assert done.statuses() == ["FINISHED", *["KILLED"] * (2 if sweep else 1)]
    assert (done.out + done.err).count("left RUNNING by a process that is gone") == 1
    errors = [run.data.tags["error"] for run in done.runs() if run.info.status == "KILLED"]
    assert all("ended without a word" in error for error in errors)


def test_what_it_had_not_told_is_told_by_sync(forked: Forked, tiny_overrides: list[str]) -> None:
    """Killed while all is still in the journal, as nothing goes out for a minute."""
    killed = forked(
        *tiny_overrides, "hydra.run.dir=outputs/job", environment={"MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "60"},
        **KILLED,
    )  # fmt: skip
    (run,) = killed.runs()
    lines = (killed.folder / "outputs/job/metrics.jsonl").read_text().splitlines()
    assert lines
    assert "train/loss" not in run.data.metrics
    done = forked("task=sync", "run=outputs/job", folder=killed.folder)
    assert done.code == 0, done.err
    (run,) = done.runs()
    last = [json.loads(line) for line in lines if "train/loss" in line][-1]
    assert run.data.metrics["train/loss"] == last["train/loss"]
    assert run.info.status == "KILLED"
    again = forked("task=sync", folder=killed.folder)
    assert "lacks nothing" in again.out
    assert not list(killed.folder.glob("outputs/job/tracking"))
    elsewhere = forked("task=sync", "run=nowhere", folder=killed.folder)
    assert (elsewhere.code, "run=nowhere is not a folder" in elsewhere.err) == (1, True)


def test_a_live_run_and_another_hosts_are_left_alone(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.tracking import MlflowClient

    from lora_exp.config import TrackingConfig
    from lora_exp.tracking.mlflow import open_run
    from lora_exp.tracking.stale import PROCESS_TAG, end_stale

    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    mine = Process.mine()
    with open_run(TrackingConfig(), "live") as live:
        experiment = client.get_run(live.run_id).info.experiment_id
        tags = {
            "elsewhere": {PROCESS_TAG: str(replace(mine, host="another", pid=2**22 + 1))},
            "not ours": {},
            "gone": {PROCESS_TAG: str(replace(mine, pid=2**22 + 1))},
        }
        made = {name: client.create_run(experiment, tags=given).info.run_id for name, given in tags.items()}
        assert end_stale(client) == 1
        assert client.get_run(live.run_id).info.status == "RUNNING"
    found = {name: client.get_run(run_id).info.status for name, run_id in made.items()}
    assert found == {"elsewhere": "RUNNING", "not ours": "RUNNING", "gone": "KILLED"}
