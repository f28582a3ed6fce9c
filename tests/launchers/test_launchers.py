"""Sweeps whose jobs run in other processes: true statuses, one parent run, no lost job, and signals that reach them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import METRICS_FILE, read_metrics, read_outcome
from lora_exp.machine.claims import owner

ROOT = Path(__file__).resolve().parents[2]
NEEDED = {
    "joblib": "hydra_plugins.hydra_joblib_launcher",
    "submitit_local": "hydra_plugins.hydra_submitit_launcher",
    "ray": "ray",
}
SETTINGS = {
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": ["hydra.launcher.init.num_cpus=2"],
}
LAUNCHERS = [pytest.param(name, marks=pytest.mark.slow) for name in NEEDED]
LONG = ["train.steps=100000", "train.eval_every=20", "train.schedule=constant"]


def chosen(launcher: str) -> list[str]:
    """What chooses it, where its extra is installed."""
    try:
        is_there = importlib.util.find_spec(NEEDED[launcher]) is not None
    except ModuleNotFoundError:
        is_there = False
    if not is_there:
        pytest.skip(f"{NEEDED[launcher]} is not installed: pip install 'lora_exp[{launcher.partition('_')[0]}]'")
    return [f"hydra/launcher={launcher}", *SETTINGS[launcher], "hydra.sweep.dir=sweep"]


class Sweep:
    """A sweep in a process of its own, in the current folder."""

    def __init__(self, arguments: list[str]) -> None:
        with Path("said").open("w") as said:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lora_exp", "-m", *arguments], stdout=said, stderr=said, start_new_session=True,
                env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            )  # fmt: skip

    def wait_for_steps(self, *jobs: int, steps: int = 5) -> None:
        """Until each of ``jobs`` has logged some."""
        until = time.monotonic() + 300
        while time.monotonic() < until and not all(lines(job) > steps for job in jobs):
            assert self.process.poll() is None, Path("said").read_text()
            time.sleep(0.1)

    def end(self) -> int:
        return self.process.wait(300)


def lines(job: int) -> int:
    with contextlib.suppress(OSError):
        return Path(f"sweep/{job}", METRICS_FILE).read_text().count("\n")
    return 0


@pytest.fixture
def begin(workplace: Path, empty_database: Path) -> Iterator[Callable[[list[str]], Sweep]]:
    """Start a sweep; whatever still runs at the end is killed."""
    (workplace / "outputs").mkdir()
    shutil.copy(empty_database, workplace / "outputs/mlflow.db")
    begun: list[Sweep] = []

    def start(arguments: list[str]) -> Sweep:
        begun.append(Sweep(arguments))
        return begun[-1]

    yield start
    for sweep in begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(sweep.process.pid, signal.SIGKILL)
        sweep.process.wait(60)


def status(job: int) -> str | None:
    outcome = read_outcome(Path(f"sweep/{job}"))
    return outcome.status if outcome else None


def runs() -> tuple[str, dict[str, int]]:
    """The parent's status, and how many of its children have which."""
    from mlflow.tracking import MlflowClient

    database = Path("outputs/mlflow.db").resolve()  # by another name it would be an earlier test's
    found = MlflowClient(f"sqlite:///{database}").search_runs(["1"])
    parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    (parent,) = parents
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len(children) == len(found) - 1
    return parent.info.status, Counter(run.info.status for run in children)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_job_is_told_by_its_number_and_has_its_true_end(
    launcher: str, begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    """The third one's config is refused, which is no end of the others."""
    sweep = begin([*chosen(launcher), *tiny_overrides, "rank=2,4,0"])
    assert sweep.end() == 1
    said = Path("said").read_text()
    assert [status(job) for job in range(3)] == ["FINISHED", "FINISHED", "FAILED"], said
    assert runs() == ("FAILED", {"FINISHED": 2})
    for job, rank in enumerate((2, 4)):
        assert f"job {job} rank={rank}  has begun" in said
        assert re.search(rf"job {job} rank={rank}  done  validation loss \d", said)
    assert "job 2 rank=0  FAILED: The config has a problem" in said
    loose = [line for line in said.splitlines() if "validation loss" in line and not line.startswith("job ")]
    assert loose == []
    assert (Path("sweep") / "comparison.csv").read_text().count("\n") == 4


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_one_signal_lets_running_jobs_keep_a_checkpoint(
    launcher: str, begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    """As a terminal sends it: to all processes that it has started."""
    sweep = begin([*chosen(launcher), *tiny_overrides, *LONG, "rank=2,4"])
    sweep.wait_for_steps(0, 1)
    os.killpg(sweep.process.pid, signal.SIGINT)
    assert sweep.end() == 130
    said = Path("said").read_text()
    assert "The sweep stops: what runs keeps a checkpoint" in said
    assert [status(job) for job in range(2)] == ["KILLED", "KILLED"], said
    assert all(list(Path(f"sweep/{job}/checkpoints").glob("step_*")) for job in range(2))
    assert runs() == ("KILLED", {"KILLED": 2})
    assert "Sweep, best first" in said


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_signal_to_one_jobs_process_ends_that_job_alone(
    launcher: str, begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    steps = "train.steps=100000,60"
    sweep = begin([*chosen(launcher), *tiny_overrides, "train.eval_every=30", steps])
    sweep.wait_for_steps(0)
    process = owner(Path("sweep/0"))
    assert process is not None
    os.kill(process.pid, signal.SIGTERM)
    assert sweep.end() == 1
    assert [status(job) for job in range(2)] == ["KILLED", "FINISHED"], Path("said").read_text()
    assert runs() == ("FAILED", {"KILLED": 1, "FINISHED": 1})
    assert list(Path("sweep/0/checkpoints").glob("step_*"))


@pytest.mark.parametrize("launcher", LAUNCHERS[1:])
def test_a_job_whose_process_dies_costs_no_other(
    launcher: str, begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    """joblib ends its whole pool with it, and says so."""
    sweep = begin([*chosen(launcher), *tiny_overrides, "train.eval_every=30", "train.steps=100000,60"])
    sweep.wait_for_steps(0)
    process = owner(Path("sweep/0"))
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    assert sweep.end() == 1
    assert [status(job) for job in range(2)] == ["KILLED", "FINISHED"], Path("said").read_text()
    assert runs() == ("FAILED", {"KILLED": 1, "FINISHED": 1})


@pytest.mark.slow
def test_a_job_that_submitit_takes_back_goes_on_from_its_checkpoint(
    begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    """Its signal, which Slurm sends before a job's time is over; one run of MLflow's in the end."""
    sweep = begin([*chosen("submitit_local"), *tiny_overrides, "train.eval_every=30", "train.steps=600,60"])
    sweep.wait_for_steps(0)
    process = owner(Path("sweep/0"))
    assert process is not None
    os.kill(process.pid, signal.SIGUSR2)
    assert sweep.end() == 0
    assert [status(job) for job in range(2)] == ["FINISHED", "FINISHED"], Path("said").read_text()
    assert runs() == ("FINISHED", {"FINISHED": 2})
    steps = [record["step"] for record in read_metrics(Path("sweep/0")) if "train/loss" in record]
    assert steps == list(range(1, 601))
    assert "what was learnt up to optimizer step" in Path("sweep/0/lora_exp.log").read_text()


@pytest.mark.slow
def test_jobs_end_with_the_process_that_launched_them(
    begin: Callable[[list[str]], Sweep], tiny_overrides: list[str]
) -> None:
    sweep = begin([*chosen("joblib"), *tiny_overrides, *LONG, "rank=2,4"])
    sweep.wait_for_steps(0, 1)
    sweep.process.kill()
    until = time.monotonic() + 100
    while time.monotonic() < until and not (status(0) and status(1)):
        time.sleep(0.2)
    assert [status(job) for job in range(2)] == ["KILLED", "KILLED"]


def test_a_missing_extra_is_named(
    cli: Callable[..., Any], tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "hydra_plugins.lora_exp_launchers._ray", raising=False)
    found = cli("-m", *tiny_overrides, "rank=2,4", "hydra/launcher=ray")
    assert found.code == 1
    assert "hydra/launcher=ray needs a package that is missing (ray)" in found.err
    assert "pip install 'lora_exp[ray]'" in found.err
