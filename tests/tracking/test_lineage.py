"""What MLflow's pages show of a run and of a sweep: names, columns, links, system metrics, files stored once."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run as FoundRun
from mlflow.tracking import MlflowClient

from lora_exp.config import TrackingConfig
from lora_exp.tracking import artifacts, lineage
from lora_exp.tracking.artifacts import local_folder, store
from lora_exp.tracking.links import where_to_look
from lora_exp.tracking.mlflow import open_run
from lora_exp.tracking.system_metrics import sampled

Cli = Callable[..., "Finished"]  # noqa: F821  # of conftest.py


def runs(workplace: Path, experiment: str = "lora_exp") -> tuple[MlflowClient, list[FoundRun]]:
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, sorted(found, key=lambda run: run.info.start_time)


@pytest.fixture
def sweep(cli: Cli, tiny_overrides: list[str], workplace: Path) -> Any:
    """Parent, children, and what the terminal said, of a sweep with a name."""

    def run(*more: str) -> tuple[FoundRun, list[FoundRun], Any]:
        done = cli(*tiny_overrides, "rank=2,4", *more, "-m")
        assert done.code == 0, done.err
        _, found = runs(workplace)
        (parent,) = [run for run in found if run.data.tags.get("lora_exp.kind") == "sweep"]
        return parent, [run for run in found if run is not parent], done

    return run


def test_a_run_fills_the_columns_of_the_list(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli(*tiny_overrides, "rank=2")
    assert done.code == 0, done.err
    client, (run,) = runs(workplace)
    assert run.data.tags["mlflow.source.name"] == "lora-exp"
    assert run.data.tags["mlflow.source.type"] == "LOCAL"
    assert run.data.tags["mlflow.user"]
    data = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert set(data) == {"training", "validation"}
    assert {(each.name, len(each.digest), each.source_type) for each in data.values()} == {("text", 16, "local")}
    assert '"held out for validation": 0.05' in data["validation"].source
    assert data["training"].digest != data["validation"].digest
    assert '"rows": ' in data["training"].profile
    assert len(run.data.tags["data_fingerprint"]) == 20
    (model,) = run.outputs.model_outputs
    logged = client.get_logged_model(model.model_id)
    assert (logged.name, str(logged.status), logged.params["rank"]) == ("tiny-lora", "READY", "2")
    assert logged.tags["files"] == f"{run.info.artifact_uri}/adapter"
    system = {name for name in run.data.metrics if name.startswith("system/")}
    assert "system/process_cpu_percentage" in system
    if pytest.importorskip("psutil"):
        assert "system/cpu_utilization_percentage" in system
    assert (
        f"/runs/{run.info.run_id}?workflowType=machine_learning (served by: python -m lora_exp.tracking.ui)" in done.out
    )
    assert "fontManager" not in done.out + done.err


def test_a_sweeps_rows_differ_and_its_parent_sums_it_up(sweep: Any, workplace: Path) -> None:
    parent, children, done = sweep()
    assert parent.info.run_name == "sweep over rank"
    assert [child.info.run_name for child in children] == ["rank=2", "rank=4"]
    assert f"/runs/{parent.info.run_id}?" in done.out
    assert not any(f"/runs/{child.info.run_id}?" in done.out for child in children)
    best = min(children, key=lambda child: child.data.metrics["eval/loss"])
    for name in ("eval/loss", "eval/perplexity", "train/loss", "params/trainable"):
        assert parent.data.metrics[name] == best.data.metrics[name]
    assert not any(name.startswith("system/") for name in parent.data.metrics)
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    steps = {name: client.get_metric_history(parent.info.run_id, name)[0].step for name in parent.data.metrics}
    assert (steps["eval/loss_before"], steps["eval/loss"], steps["params/trainable"]) == (0, 4, 0)
    assert parent.inputs.dataset_inputs
    assert parent.outputs.model_outputs
    params = parent.data.params
    assert (params["rank"], params["adapter"], params["seed"]) == ("2, 4", "lora", "0")
    assert parent.data.tags["best_run_id"] == best.info.run_id
    assert parent.data.tags["mlflow.user"]


def test_a_sweeps_own_name_is_the_parents_and_goes_before_the_childrens(sweep: Any) -> None:
    parent, children, _ = sweep("tracking.run_name=mine", "scaling=rslora")
    assert parent.info.run_name == "mine"
    assert [child.info.run_name for child in children] == ["mine rank=2", "mine rank=4"]


def test_a_single_run_is_called_as_asked(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    assert cli(*tiny_overrides, "tracking.run_name=mine").code == 0
    _, (run,) = runs(workplace)
    assert run.info.run_name == "mine"


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://server:5000/", "MLflow http://server:5000/#/experiments/3/runs/abc?workflowType=machine_learning"),
        ("sqlite:///elsewhere.db", "(served by: python -m lora_exp.tracking.ui sqlite:///elsewhere.db)"),
    ],
)
def test_the_line_at_the_end_says_where_to_look(uri: str, says: str, workplace: Path) -> None:
    assert says in where_to_look(uri, "3", "abc")


def test_make_is_named_under_make(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAKELEVEL", "1")
    assert where_to_look(f"sqlite:///{workplace}/outputs/mlflow.db", "1", "a").endswith("(served by: make ui)")


def test_a_server_that_knows_no_models_costs_no_run(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object, **__: object) -> None:
        raise RuntimeError("404: no such endpoint")

    monkeypatch.setattr("lora_exp.tracking.lineage.log_model", unknown)
    done = cli(*tiny_overrides)
    assert (done.code, "404" in done.out) == (0, True)
    _, (run,) = runs(workplace)
    assert run.info.status == "FINISHED"


# Stored once


def test_an_adapter_is_stored_once(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    assert cli(*tiny_overrides).code == 0
    (own,) = workplace.glob("outputs/runs/*/*/adapter/adapter_model.safetensors")
    (artifact,) = workplace.glob("outputs/mlartifacts/*/artifacts/adapter/adapter_model.safetensors")
    assert own.samefile(artifact)
    whole = own.read_bytes()
    assert not stat.S_IMODE(own.stat().st_mode) & 0o222, "two names of one file that can be written into"
    own.unlink()
    assert artifact.read_bytes() == whole


@pytest.mark.parametrize("changed", ["source", "target"])
def test_replacing_or_removing_one_name_leaves_the_other(tmp_path: Path, changed: str) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    file, placed = folder / "adapter_model.safetensors", tmp_path / "stored/adapter_model.safetensors"
    file.write_bytes(b"one")
    store(folder, placed.parent)
    assert file.samefile(placed)
    if changed == "source":  # as the next save does
        (tmp_path / "new").write_bytes(b"two")
        (tmp_path / "new").replace(file)
        assert (file.read_bytes(), placed.read_bytes()) == (b"two", b"one")
        store(folder, placed.parent)
        assert placed.read_bytes() == b"two"
    else:
        placed.unlink()
        assert file.read_bytes() == b"one"


def test_what_is_written_into_is_copied(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("one")
    store(file, tmp_path / "stored")
    file.write_text("two")
    assert (tmp_path / "stored/metrics.jsonl").read_text() == "one"


def test_where_links_cannot_be_made_it_is_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise OSError(18, os.strerror(18))

    monkeypatch.setattr(artifacts.os, "link", refused)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(b"one")
    store(file, tmp_path / "stored")
    assert not file.samefile(tmp_path / "stored" / file.name)
    assert (tmp_path / "stored" / file.name).read_bytes() == b"one"


@pytest.mark.parametrize(
    ("uri", "folder"),
    [
        ("file:///a%20b/c", "/a b/c"),
        ("file:///25%2520/c", "/25%20/c"),
        ("/a/b", "/a/b"),
        ("mlflow-artifacts:/1/2", None),
        ("s3://bucket/x", None),
    ],
)
def test_only_folders_of_this_machine_are_written_into(uri: str, folder: str | None) -> None:
    assert local_folder(uri) == (Path(folder) if folder else None)


# System metrics


def test_system_metrics_come_at_their_interval_and_once_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.2")
    samples: list[tuple[int, Mapping[str, float]]] = []
    with sampled(lambda figures, step: samples.append((step, figures))):
        busy_until = time.monotonic() + 0.7
        while time.monotonic() < busy_until:
            pass
    assert [step for step, _ in samples] == list(range(len(samples)))
    assert 2 <= len(samples) <= 5
    assert samples[0][1]["system/process_cpu_percentage"] > 5
    assert not [thread for thread in threading.enumerate() if thread.name == "system metrics"]


def test_system_metrics_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with sampled(lambda *_: pytest.fail("sampled")):
        pass
    samples: list[object] = []
    with sampled(lambda *sample: samples.append(sample), is_wanted=True):  # tracking.system_metrics=true wins
        pass
    assert samples
    monkeypatch.delenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING")
    with sampled(lambda *_: pytest.fail("sampled"), is_wanted=False):
        pass


def test_a_sampler_that_cannot_send_harms_nothing() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("gone")

    with sampled(broken):
        pass


# Data


@pytest.mark.parametrize("error", [RuntimeError("broke"), KeyboardInterrupt()])
def test_a_run_that_fails_says_where_to_look_too(
    workplace: Path, caplog: pytest.LogCaptureFixture, error: BaseException
) -> None:
    with caplog.at_level("INFO"), pytest.raises(type(error)), open_run(TrackingConfig(), "fails") as run:
        raise error
    assert f"/runs/{run.run_id}" in caplog.text
    assert not [thread for thread in threading.enumerate() if thread.name == "system metrics"]


def test_a_link_holds_no_login() -> None:
    assert "hunter2" not in where_to_look("http://me:hunter2@server:5000", "1", "a")


def test_data_that_another_job_lists_at_the_same_moment_is_listed_too(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What MLflow says to the later one of two jobs of a parallel sweep, once."""
    from mlflow.exceptions import MlflowException

    log_dataset, calls = lineage.log_dataset, []

    def beaten(*given: Any) -> None:
        calls.append(given)
        if len(calls) == 1:
            raise MlflowException("(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.name", 3)
        log_dataset(*given)

    monkeypatch.setattr(lineage, "log_dataset", beaten)
    done = cli(*tiny_overrides)
    assert done.code == 0, done.err
    _, (run,) = runs(workplace)
    assert run.inputs.dataset_inputs
    assert "does not list" not in done.out + done.err


def test_a_sweep_that_is_repeated_with_more_tells_what_is_new(
    cli: Cli, tiny_overrides: list[str], workplace: Path
) -> None:
    """In its own folder, and so its own run: no other values for params, no data twice, the new best one's figures."""
    for ranks in ("2,4", "2,4", "2,4,6"):
        done = cli(*tiny_overrides, f"rank={ranks}", "hydra.sweep.dir=outputs/again", "optimizer.lr=3e-2", "-m")
        assert done.code == 0, done.err
        assert not [word for word in ("UNIQUE", "refuses", "does not list") if word in done.out + done.err]
    client, found = runs(workplace)
    (parent,) = [run for run in found if run.data.tags.get("lora_exp.kind") == "sweep"]
    best = client.get_run(parent.data.tags["best_run_id"])
    assert parent.data.params["rank"] == "2, 4"
    assert parent.data.tags["swept.rank"] == "2, 4, 6"
    assert {key: value for key, value in best.data.metrics.items() if key.startswith("eval/")}.items() <= (
        parent.data.metrics.items()
    )
    assert best.outputs.model_outputs[0].model_id in {each.model_id for each in parent.outputs.model_outputs}
