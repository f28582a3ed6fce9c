"""MLflow runs end as they should, whatever ends them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from lora_exp.config import TrackingConfig
from lora_exp.tracking.client import tracking_uri
from lora_exp.tracking.mlflow import open_run
from lora_exp.tracking.sweeps import ended_sweep
from lora_exp.tracking.tracked import NoRun

SECTION = TrackingConfig()


def client(workplace: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")


@pytest.mark.parametrize(
    ("status", "error"), [("FINISHED", None), ("FAILED", RuntimeError("broke")), ("KILLED", KeyboardInterrupt())]
)
def test_status_follows_the_way_the_block_ends(status: str, error: BaseException | None, workplace: Path) -> None:
    ends = contextlib.nullcontext() if error is None else pytest.raises(type(error))
    with ends, open_run(SECTION, status) as run:
        if error:
            raise error
    found = client(workplace).get_run(run.run_id)
    assert found.info.status == status
    assert found.data.tags.get("error") == (None if error is None else str(error) or type(error).__name__)


def test_metrics_sent_in_the_background_are_all_there_at_the_end(workplace: Path) -> None:
    with open_run(SECTION, "many") as run:
        for step in range(50):
            run.log_metrics({"m": step / 7, "n": step}, step)
    history = client(workplace).get_metric_history(run.run_id, "m")
    assert sorted((metric.step, metric.value) for metric in history) == [(step, step / 7) for step in range(50)]


def test_a_run_id_in_the_environment_changes_nothing(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with open_run(SECTION, "child", sweep_folder=workplace / "sweep") as run:
        pass
    assert run.run_id != "0" * 32
    known = json.loads((workplace / "sweep/sweep.json").read_text())
    tags = client(workplace).get_run(run.run_id).data.tags
    assert tags["mlflow.parentRunId"] == known["parent_run_id"]


def test_the_address_comes_from_the_config_then_the_environment(
    workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tracking_uri(SECTION) == f"sqlite:///{workplace}/outputs/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://from.env")
    assert tracking_uri(SECTION) == "http://from.env"
    assert tracking_uri(TrackingConfig(uri="http://from.config")) == "http://from.config"


def test_switched_off_it_takes_everything_and_does_nothing(workplace: Path) -> None:
    with open_run(TrackingConfig(enabled=False), "none") as run:
        run.log_metrics({"m": 1.0}, 1)
    assert isinstance(run, NoRun)
    assert not (workplace / "outputs").exists()


def test_a_sweep_that_no_job_joined_needs_no_closing(workplace: Path) -> None:
    with ended_sweep(workplace / "sweep", "FINISHED") as run:
        assert run is None
    assert not (workplace / "outputs").exists()


JOIN = "import sys; from pathlib import Path; from lora_exp.config import TrackingConfig as T; from lora_exp.tracking.mlflow import open_run\nwith open_run(T(), 'child', Path('sweep').resolve()) as run: run.log_metrics({'m': 1.0}, 0)"  # fmt: skip # noqa: E501


@pytest.mark.slow
def test_processes_that_race_for_a_new_database_share_one_parent(workplace: Path) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", JOIN], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for racer in racers:
        _, err = racer.communicate(timeout=300)
        assert racer.returncode == 0, err
    found = client(workplace)
    runs = found.search_runs([found.get_experiment_by_name("lora_exp").experiment_id])
    assert len(runs) == 3
    assert len({run.data.tags.get("mlflow.parentRunId") for run in runs}) == 2  # None and the one parent


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_runs_as_killed(workplace: Path, tiny_overrides: list[str], signum: int) -> None:
    arguments = [*tiny_overrides, "train.steps=100000", "train.eval_every=50", "rank=2,4", "-m"]
    program = [sys.executable, "-m", "lora_exp", *arguments]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background has it ignored
    )  # fmt: skip
    waiting = time.monotonic() + 240
    while time.monotonic() < waiting and not list(workplace.glob("outputs/sweeps/*/*/0/adapter")):
        time.sleep(0.2)
    process.send_signal(signum)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + signum, err
    assert "Traceback" not in err
    assert "KILLED" in out
    found = client(workplace)
    runs = found.search_runs([found.get_experiment_by_name("lora_exp").experiment_id])
    assert [run.info.status for run in runs] == ["KILLED", "KILLED"]  # the parent and its first child
    child = next(run for run in runs if "mlflow.parentRunId" in run.data.tags)
    assert "adapter" in {file.path for file in found.list_artifacts(child.info.run_id)}


def test_what_a_thread_would_import_is_there_when_a_sweep_is_summed_up(workplace: Path) -> None:
    """In a process that ran no job itself (joblib's): plotly took what it found of pandas, which was half of it."""
    (workplace / "sweep.json").write_text('{"parent_run_id": "p", "uri": "http://127.0.0.1:1", "experiment": "e"}')
    code = """
import sys
from pathlib import Path
from lora_exp.tracking import sweeps

class Run:
    def __init__(self, *_, **__):
        sys.exit(0 if hasattr(sys.modules.get("pandas"), "Series") else 3)

sweeps.MlflowRun = Run
with sweeps.ended_sweep(Path(), "FINISHED"):
    pass
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=workplace, check=False).returncode == 0
