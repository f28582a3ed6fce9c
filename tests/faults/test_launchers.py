"""The launchers themselves: torchrun, accelerate launch, and a signal that the launcher gets."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import read_outcome

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc_per_node", "2", "--standalone"],
    "accelerate": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.fixture
def launch(workplace: Path) -> Iterator[Any]:
    """Start the package under a launcher; whatever still runs at the end is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(launcher: str, *arguments: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "lora_exp", *arguments]
        with (workplace / "said").open("w") as said:
            started.append(subprocess.Popen(command, stdout=said, stderr=said, text=True, env=environment))
        return started[-1]

    yield start
    for process in started:
        process.terminate()
        process.wait(60)


def statuses(folder: Path) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    return [run.info.status for run in client.search_runs(["1"])]


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launcher_starts_one_training(launcher: str, launch: Any, workplace: Path, tiny_overrides: list[str]) -> None:
    process = launch(launcher, *tiny_overrides, "hydra.run.dir=job")
    assert process.wait(300) == 0, (workplace / "said").read_text()
    said = (workplace / "said").read_text()
    assert said.count("2 processes (ddp): 2 × 1 × 2 rows an optimizer step") == 1
    assert said.count("step    4/4") == 1
    assert statuses(workplace) == ["FINISHED"]


def test_a_signal_to_the_launcher_ends_the_run_as_killed(
    launch: Any, workplace: Path, tiny_overrides: list[str]
) -> None:
    process = launch("torchrun", *tiny_overrides, "hydra.run.dir=job", "train.steps=100000")
    until = time.monotonic() + 200
    while "step    4/" not in (workplace / "said").read_text() and time.monotonic() < until:
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(100) != 0
    outcome = read_outcome(workplace / "job")
    assert outcome is not None
    assert (outcome.status, outcome.error) == ("KILLED", "SIGTERM")
    assert statuses(workplace) == ["KILLED"]
