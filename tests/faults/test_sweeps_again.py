"""A sweep that is killed and asked for again does what is missing, and no more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import Outcome, Result, read_outcome

Forked = Callable[..., Any]
STEP = "lora_exp.training.loop:_accumulate"
RANKS = ["rank=1,2,3,4,5,6", "-m"]
KEPT = ["train.save_every=1"]
LAUNCHERS = {
    "basic": [],
    "packed": ["hydra/launcher=packed", "hydra.launcher.lanes=1"],
    "joblib": ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"],
    "ray": ["hydra/launcher=ray", "hydra.launcher.init.num_cpus=2"],
}
EXTRAS = {"joblib": "hydra_plugins.hydra_joblib_launcher", "ray": "ray"}


def sweeps(folder: Path) -> list[Path]:
    """The folders of the sweeps, in the order in which they began."""
    return sorted((folder / "outputs/sweeps").glob("*/*"))


def results(sweep: Path) -> dict[int, Result]:
    """What its jobs found, by rank."""
    outcomes = [read_outcome(job) for job in sorted(sweep.iterdir()) if (job / "result.json").is_file()]
    found: dict[int, Result] = {}
    for outcome in outcomes:
        assert isinstance(outcome, Outcome)
        if outcome.status == "FINISHED":
            assert isinstance(outcome.result, Result)
            found[int(str(outcome.values["rank"]))] = outcome.result
    return found


def children(folder: Path) -> list[list[Any]]:
    """The MLflow runs of each sweep's jobs, in the order of the sweeps' own runs."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    runs = list(client.search_runs(["1"]))
    parents = sorted(
        (run for run in runs if run.data.tags.get("lora_exp.kind") == "sweep"), key=lambda run: run.info.start_time
    )
    return [
        [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id] for parent in parents
    ]


@pytest.mark.parametrize("launcher", ["basic", pytest.param("packed", marks=pytest.mark.slow)])
def test_a_sweep_killed_in_its_fourth_job_is_completed(
    launcher: str, forked: Forked, tiny_overrides: list[str]
) -> None:
    arguments = [*tiny_overrides, *KEPT, *RANKS, *LAUNCHERS[launcher]]
    whole = forked(*arguments)
    half = forked(*arguments, target=STEP, at=15, do="kill")  # the third of the fourth job's four steps
    assert half.code == -signal.SIGKILL
    again = forked(*arguments, folder=half.folder)
    assert again.code == 0, again.err
    assert again.out.count("job    reused from outputs/sweeps/") == 3
    assert again.out.count("from optimizer step 2\n") == 1
    assert again.out.count("step    4/4") == 3

    found, expected = results(sweeps(again.folder)[1]), results(sweeps(whole.folder)[0])
    assert sorted(found) == [1, 2, 3, 4, 5, 6]
    assert [found[rank].reused_from is not None for rank in range(1, 7)] == [True] * 3 + [False] * 3
    for rank, result in expected.items():
        assert (found[rank].eval_loss, found[rank].adapter_sha256) == (result.eval_loss, result.adapter_sha256)
        assert (found[rank].identity, found[rank].metrics) == (result.identity, result.metrics)

    table = (sweeps(again.folder)[1] / "comparison.csv").read_text().splitlines()
    assert sorted(line.rpartition(",")[2] for line in table[1:]) == ["FINISHED"] * 3 + ["FINISHED (reused)"] * 3

    before, after = children(again.folder)
    assert sorted(run.data.params["rank"] for run in after) == list("123456")
    assert {run.info.status for run in after} == {"FINISHED"}
    assert sorted("reused_from" in run.data.tags for run in after) == [False] * 3 + [True] * 3
    assert {tuple(sorted(_own(run.data.metrics))) for run in after} == {tuple(sorted(_own(before[0].data.metrics)))}
    assert {run.data.metrics["eval/loss"] for run in after} == {result.eval_loss for result in found.values()}
    assert {run.data.tags["reused_from"] for run in after if "reused_from" in run.data.tags} == {
        run.info.run_id for run in before
    }
    _nothing_is_run(forked, arguments, again.folder)


def _nothing_is_run(forked: Forked, arguments: list[str], folder: Path) -> None:
    began = time.monotonic()
    third = forked(*arguments, folder=folder, target="lora_exp.run:_run", do="fail")
    assert third.code == 0, third.out + third.err
    assert third.out.count("job    reused from") == 6
    assert "step " not in third.out
    assert len(results(sweeps(folder)[2])) == 6
    assert [len(each) for each in children(folder)] == [3, 6, 6]
    assert time.monotonic() - began < 120  # on a machine that is busy with others; seconds where it is not


def _own(names: Any) -> set[str]:
    return {name for name in names if not name.startswith("system/")}


def test_the_same_folder_is_completed(forked: Forked, tiny_overrides: list[str]) -> None:
    """Where the sweep's folder has a name, the jobs that are there stay there, as do their runs."""
    arguments = [*tiny_overrides, *KEPT, "rank=1,2,3", "-m", "hydra.sweep.dir=outputs/sweep"]
    half = forked(*arguments, target=STEP, at=7, do="kill")
    assert half.code == -signal.SIGKILL
    again = forked(*arguments, folder=half.folder)
    assert again.code == 0, again.err
    assert again.out.count("job    reused from outputs/sweep/0") == 1
    assert again.out.count("from optimizer step 2\n") == 1
    assert sorted(results(again.folder / "outputs/sweep")) == [1, 2, 3]
    ((first, *rest),) = children(again.folder)
    assert [run.info.status for run in (first, *rest)] == ["FINISHED"] * 3
    third = forked(*arguments, folder=half.folder, target="lora_exp.run:_run", do="fail")
    assert third.code == 0, third.out + third.err
    assert [len(each) for each in children(again.folder)] == [3]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", EXTRAS)
def test_with_jobs_in_two_processes(launcher: str, workplace: Path, tiny_overrides: list[str]) -> None:
    """All that had finished when they were killed is reused, what was begun goes on."""
    if util.find_spec(EXTRAS[launcher]) is None:
        pytest.skip(f"the extra {launcher} is not installed")
    arguments = [*tiny_overrides, *KEPT, *RANKS, *LAUNCHERS[launcher], "train.steps=40"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lora_exp", *arguments]

    def begin(said: str) -> subprocess.Popen[bytes]:
        with (workplace / said).open("wb") as stream:
            return subprocess.Popen(command, stdout=stream, stderr=stream, env=environment, start_new_session=True)

    first = begin("first")
    until = time.monotonic() + 500
    while first.poll() is None and time.monotonic() < until and not _is_in_the_fourth(workplace):
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL, (workplace / "first").read_text()
    done = len(results(sweeps(workplace)[0]))
    assert done >= 3
    assert begin("second").wait() == 0, (workplace / "second").read_text()
    second = results(sweeps(workplace)[1])
    assert sorted(second) == [1, 2, 3, 4, 5, 6]
    assert sum(result.reused_from is not None for result in second.values()) == done
    logs = [file.read_text() for file in sweeps(workplace)[1].glob("*/lora_exp.log")]
    assert 1 <= sum("from optimizer step" in text for text in logs) <= 2
    assert begin("third").wait() == 0, (workplace / "third").read_text()
    assert all(result.reused_from for result in results(sweeps(workplace)[2]).values())
    assert [len(each) for each in children(workplace)][1:] == [6, 6]


def _is_in_the_fourth(folder: Path) -> bool:
    found = sweeps(folder)
    begun = len(list(found[0].glob("*/checkpoints/step_*"))) if found else 0
    return bool(found) and len(results(found[0])) >= 3 and begun > 2 * len(results(found[0]))
