"""Never the same work twice, row by row: what a repeated job meets, and what it then does."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lora_exp.job import Result, read_outcome

Cli = Callable[..., Any]
REUSED = "job    reused from"


@pytest.fixture(autouse=True)
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The ranks of the jobs that are trained, in order."""
    from lora_exp import run

    ran: list[int] = []
    original = run._run

    def counting(config: Any, *others: Any) -> Any:
        ran.append(config.rank)
        return original(config, *others)

    monkeypatch.setattr(run, "_run", counting)
    return ran


@pytest.fixture
def tiny(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "train.steps=2"]


def result_of(folder: Path) -> Result:
    outcome = read_outcome(folder)
    assert outcome is not None
    assert isinstance(outcome.result, Result)
    return outcome.result


def runs(workplace: Path) -> dict[str, list[Any]]:
    """The children of each sweep by its folder's name, in the order in which they began."""
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    found = list(client.search_runs(["1"], order_by=["attributes.start_time ASC"]))
    parents = {run.info.run_id: Path(run.data.tags["folder"]).name for run in found if _is_sweep(run)}
    children: dict[str, list[Any]] = {name: [] for name in parents.values()}
    for run in found:
        if not _is_sweep(run) and "mlflow.parentRunId" in run.data.tags:
            children[parents[run.data.tags["mlflow.parentRunId"]]].append(run)
    return children


def _is_sweep(run: Any) -> bool:
    return bool(run.data.tags.get("lora_exp.kind") == "sweep")


def test_adding_a_rank_costs_a_rank(cli: Cli, tiny: list[str], workplace: Path, counted: list[int]) -> None:
    """The others stand in the new sweep's table, in its report and as its children in MLflow, with what they found."""
    assert cli(*tiny, "rank=2,4", "-m", "hydra.sweep.dir=outputs/first").code == 0
    done = cli(*tiny, "rank=2,3,4", "-m", "hydra.sweep.dir=outputs/second")
    assert done.code == 0, done.err
    assert counted == [2, 4, 3]
    assert done.out.count(REUSED) == 2
    table = (workplace / "outputs/second/comparison.csv").read_text()
    assert table.count("FINISHED (reused)") == 2
    assert len(table.splitlines()) == 4
    first, second = runs(workplace)["first"], runs(workplace)["second"]
    assert [run.data.tags.get("reused_from") for run in second] == [first[0].info.run_id, None, first[1].info.run_id]
    was, stands = first[0], second[0]
    assert stands.info.status == "FINISHED"
    assert stands.data.params == was.data.params
    assert {key: value for key, value in was.data.metrics.items() if not key.startswith("system/")} == {
        key: value for key, value in stands.data.metrics.items() if not key.startswith("system/")
    }
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    curves = [[(point.step, point.value) for point in client.get_metric_history(run.info.run_id, "eval/loss")]
              for run in (was, stands)]  # fmt: skip
    assert curves[0] == curves[1]
    assert len(curves[0]) == 2
    for tag in ("adapter_sha256", "base_files_sha256", "data_fingerprint", "job_identity", "machine.bf16"):
        assert stands.data.tags[tag] == was.data.tags[tag]
    # It can be used as any other: the folder holds what a run's does, and its weights are on the disk once.
    weights = [workplace / f"outputs/{name}/0/adapter/adapter_model.safetensors" for name in ("first", "second")]
    assert weights[0].samefile(weights[1])
    assert result_of(workplace / "outputs/second/0").adapter == str(workplace / "outputs/second/0/adapter")
    used = cli("task=evaluate", "run=outputs/second/0", "evaluate.base=false")
    assert used.code == 0, used.err
    third = cli(*tiny, "rank=2,3,4", "-m", "hydra.sweep.dir=outputs/third")
    assert third.out.count(REUSED) == 3
    assert counted == [2, 4, 3]
    assert [run.data.tags["reused_from"] for run in runs(workplace)["third"]] == [
        first[0].info.run_id, second[1].info.run_id, first[1].info.run_id,
    ]  # fmt: skip  # the run that did the work, however often it was reused


def test_single_runs_are_run_as_they_are_asked_for(cli: Cli, tiny: list[str], counted: list[int]) -> None:
    """And stand in a sweep all the same, as does the same job of one sweep."""
    one = [*tiny, "rank=2", "tracking=none"]
    assert cli(*one, "hydra.run.dir=outputs/one").code == 0
    assert cli(*one, "hydra.run.dir=outputs/two").code == 0
    assert counted == [2, 2]
    assert cli(*one, "sweep.reuse=true", "hydra.run.dir=outputs/three").out.count(REUSED) == 1
    sweep = cli(*tiny, "rank=2,3,3", "-m", "tracking=none")
    assert sweep.out.count(REUSED) == 2
    assert counted == [2, 2, 3]
    assert cli(*tiny, "rank=2,3", "-m", "tracking=none", "sweep.reuse=false").out.count(REUSED) == 0
    assert counted == [2, 2, 3, 2, 3]


def test_an_adapter_that_is_gone_or_damaged_is_trained_again(
    cli: Cli, tiny: list[str], workplace: Path, counted: list[int]
) -> None:
    sweep = [*tiny, "rank=2,3,4", "-m", "tracking=none", "train.keep_checkpoints=0"]
    assert cli(*sweep, "hydra.sweep.dir=outputs/first").code == 0
    shutil.rmtree(workplace / "outputs/first/0/adapter")
    weights = workplace / "outputs/first/1/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (workplace / "outputs/first/2/metrics.jsonl").unlink()
    again = cli(*sweep, "hydra.sweep.dir=outputs/second")
    assert again.code == 0, again.err
    assert again.out.count("not reused from") == 3
    assert counted == [2, 3, 4] * 2


@pytest.mark.parametrize("status", ["FAILED", "KILLED", "PRUNED"])
def test_what_did_not_finish_is_not_reused(
    status: str, cli: Cli, tiny: list[str], workplace: Path, counted: list[int]
) -> None:
    sweep = [*tiny, "rank=2", "-m", "train.keep_checkpoints=0", "tracking=none"]
    assert cli(*sweep, "hydra.sweep.dir=outputs/first").code == 0
    file = workplace / "outputs/first/0/result.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": status}))
    assert cli(*sweep, "hydra.sweep.dir=outputs/second").code == 0
    assert counted == [2, 2]


def test_a_folder_that_was_moved_is_found_by_mlflow_or_by_a_look_around(
    cli: Cli, tiny: list[str], workplace: Path, counted: list[int]
) -> None:
    """What a colleague has run on another machine is fetched from the server that both use."""
    sweep = [*tiny, "rank=2", "-m"]
    assert cli(*sweep).code == 0
    shutil.rmtree(workplace / "outputs/.jobs")
    assert cli(*sweep, "tracking=none").out.count(REUSED) == 1
    shutil.rmtree(workplace / "outputs/.jobs")
    shutil.rmtree(workplace / "outputs/sweeps")
    fetched = cli(*sweep, "hydra.sweep.dir=outputs/fetched")
    assert fetched.code == 0, fetched.err
    assert fetched.out.count(REUSED) == 1
    assert counted == [2]
    assert result_of(workplace / "outputs/fetched/0").step == 2
    assert (workplace / "outputs/fetched/0/adapter/adapter_config.json").is_file()


def test_what_mlflow_never_knew_is_told_whole(cli: Cli, tiny: list[str], workplace: Path, counted: list[int]) -> None:
    assert cli(*tiny, "rank=2", "-m", "tracking=none", "hydra.sweep.dir=outputs/first").code == 0
    done = cli(*tiny, "rank=2", "-m", "hydra.sweep.dir=outputs/second")
    assert done.code == 0, done.err
    assert counted == [2]
    (run,) = runs(workplace)["second"]
    assert run.data.tags["reused_from"] == str(workplace / "outputs/first/0")
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    assert {file.path for file in client.list_artifacts(run.info.run_id)} >= {"adapter", "metrics.jsonl", "config.yaml"}
    assert [point.step for point in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]
    for name in ("params/trainable", "wall_s", "best/loss", "eval/loss"):
        assert name in run.data.metrics


def test_a_server_that_is_away_is_said_as_of_any_job(cli: Cli, tiny: list[str], counted: list[int]) -> None:
    assert cli(*tiny, "rank=2", "-m", "tracking=none").code == 0
    done = cli(*tiny, "rank=2", "-m", "tracking.uri=http://127.0.0.1:9")
    assert done.code == 1
    assert "The tracking server http://127.0.0.1:9 cannot be reached" in done.out + done.err
    assert counted == [2]


def test_a_plan_and_a_task_on_finished_runs_are_always_done(cli: Cli, tiny: list[str], workplace: Path) -> None:
    plan = [*tiny, "task=plan", "rank=2,4", "-m"]
    for _ in range(2):
        done = cli(*plan)
        assert done.code == 0, done.err
        assert REUSED not in done.out


def test_another_run_that_was_interrupted_in_the_folder_is_left_alone(
    cli: Cli, tiny: list[str], workplace: Path, counted: list[int]
) -> None:
    from lora_exp.training import checkpoints

    one = [*tiny, "tracking=none", "train.save_every=1"]
    assert cli(*one, "rank=2", "hydra.run.dir=outputs/one").code == 0
    assert cli(*one, "rank=3", "hydra.run.dir=outputs/two").code == 0
    newest = workplace / "outputs/two/checkpoints/step_00000002"
    shutil.rmtree(newest)
    assert not checkpoints.Checkpoints(newest.parent).is_over()
    done = cli(*one, "rank=2", "sweep.reuse=true", "hydra.run.dir=outputs/two")
    assert done.code == 1
    assert "holds a run that stopped after optimizer step 1" in done.out + done.err
    assert counted == [2, 3]


def test_an_interrupted_run_that_mlflow_has_forgotten_is_run_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """``resume`` itself would refuse it, and a sweep could not be completed."""
    from lora_exp.config import Config, TrackingConfig
    from lora_exp.sweep import reuse

    monkeypatch.setattr("lora_exp.sweep.reuse.finished.has_run", lambda section, run_id: run_id == "known")
    for run_id, is_there in {"known": True, "deleted": False}.items():
        assert reuse._is_tracked_here(Config(), {"run_id": run_id}) is is_there
        assert reuse._is_tracked_here(Config(tracking=TrackingConfig(enabled=False)), {"run_id": run_id})
    assert reuse._is_tracked_here(Config(), {"run_id": None})
