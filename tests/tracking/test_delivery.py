"""Whatever the server does, nothing waits for it, and in the end it has each point once."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import TrackingConfig
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking import telling
from lora_exp.tracking.leftovers import tell_rest
from lora_exp.tracking.outbox import InDeliveryError, Outbox, outboxes

STEPS = 40


@pytest.fixture
def server(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Start a tracking server that fails as it is told."""
    import runpy

    build = runpy.run_path(str(Path(__file__).parents[1] / "faults/fake_server.py"))["FakeServer"]
    started: list[Any] = []

    def start(trouble: Callable[[str, int], str | None] = lambda call, number: None) -> Any:
        started.append(build(workplace / "server", trouble=trouble))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{started[-1].port}")
        return started[-1]

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    yield start
    for each in started:
        each.close()


def trained(folder: Path, steps: range = range(STEPS), pause_s: float = 0.01, **how: Any) -> tuple[str, float]:
    """Tell a run ``steps``. Returns its id, and the longest that any of them waited."""
    longest = 0.0
    with tracking.open_run(TrackingConfig(), "run", folder=folder, **how) as run:
        for step in steps:
            began = time.monotonic()
            run.log_metrics({"loss": step / 7, "rate": 1.0}, step)
            longest = max(longest, time.monotonic() - began)
            time.sleep(pause_s)
    assert run.run_id is not None
    return run.run_id, longest


def fails(*numbers: int, how: str) -> Callable[[str, int], str | None]:
    """At the calls with these numbers, of those that tell metrics."""
    seen = [0]

    def trouble(call: str, number: int) -> str | None:
        seen[0] += call == "runs/log-batch"
        return how if call == "runs/log-batch" and seen[0] in numbers else None

    return trouble


def half(how: str) -> Callable[[str, int], str | None]:
    """Of the calls after those that open a run, each as a coin falls."""
    coin = random.Random(0)
    return lambda call, number: how if number > 6 and coin.random() < 0.5 else None


@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(lambda call, number: None, id="well"),
        pytest.param(fails(2, 3, 4, how="500"), id="500s"),
        pytest.param(fails(1, 3, how="lost"), id="answers lost"),
        pytest.param(fails(2, how="silence"), id="silence"),
        pytest.param(half("500"), id="half of the requests fail"),
        pytest.param(half("lost"), id="half of the answers are lost"),
    ],
)
def test_each_point_arrives_once_and_no_step_waits(
    trouble: Callable[[str, int], str | None], server: Callable[..., Any], tmp_path: Path
) -> None:
    started = server(trouble)
    run_id, longest = trained(tmp_path / "job")
    assert started.steps(run_id, "loss") == list(range(STEPS))
    assert started.steps(run_id, "rate") == list(range(STEPS))
    assert started.statuses() == ["FINISHED"]
    assert longest < 1
    assert not (tmp_path / "job/tracking").exists()  # nothing is left to deliver


def test_what_a_server_that_died_lacks_is_delivered_later(
    server: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    is_away = [False]
    started = server(lambda call, number: "500" if is_away[0] else None)
    monkeypatch.setattr(tracking, "_PATIENCE_S", 0.5)
    job = tmp_path / "job"
    job.mkdir()
    (job / "notes.txt").write_text("seen")
    with tracking.open_run(TrackingConfig(), "run", folder=job) as run:
        run.log_metrics({"loss": 1.0}, 0)
        time.sleep(0.3)
        is_away[0] = True
        run.log_metrics({"loss": 0.5}, 1)
        run.log_params({"rank": 8})
        run.log_tags({"colour": "red"})
        run.log_artifact(job / "notes.txt")
    assert run.run_id is not None
    assert f"task=sync run={job}" in caplog.text
    assert started.statuses() == ["RUNNING"]
    assert outboxes(tmp_path) == [(job, run.run_id)]
    is_away[0] = False
    told = tell_rest(job, run.run_id, patience_s=5)
    assert (told.left, told.lines) == (0, 5)  # the status is the fifth
    assert started.steps(run.run_id, "loss") == [0, 1]
    assert started.statuses() == ["FINISHED"]
    sent = json.dumps(started.requests)
    assert '"rank"' in sent
    assert '"colour"' in sent
    assert (tmp_path / "server" / run.run_id / "artifacts/notes.txt").read_text() == "seen"
    assert outboxes(tmp_path) == []


def test_a_run_that_goes_on_repeats_no_point(server: Callable[..., Any], tmp_path: Path) -> None:
    """As after a checkpoint: steps 5 to 9 are trained again."""
    started = server()
    run_id, _ = trained(tmp_path / "job", range(10))
    assert started.statuses() == ["FINISHED"]
    again, _ = trained(tmp_path / "job", range(5, 20), run_id=run_id)
    assert again == run_id
    assert started.steps(run_id, "loss") == list(range(20))
    assert started.statuses() == ["FINISHED"]
    updates = [given["status"] for path, given in started.requests if path.endswith("runs/update")]
    assert updates == ["FINISHED", "RUNNING", "RUNNING", "FINISHED"]


def test_an_unknown_run_cannot_be_gone_on_with(workplace: Path) -> None:
    with (
        pytest.raises(tracking.TrackingError, match="no run 0000"),
        tracking.open_run(TrackingConfig(), "x", run_id="0" * 32),
    ):
        pass


def test_a_deleted_run_is_said_and_training_goes_on(
    workplace: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    with tracking.open_run(TrackingConfig(), "x", folder=tmp_path / "job") as run:
        MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db").delete_run(run.run_id)
        run.log_metrics({"loss": 1.0}, 0)
    assert "was deleted" in caplog.text


def test_only_what_is_refused_is_left_out(
    tmp_path: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with tracking.open_run(TrackingConfig(), "x", folder=tmp_path / "job") as run:
        run.log_metrics({"good": 1.0, "bad\nname": 2.0, "fine": 3.0}, 0)
    found = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db").get_run(run.run_id)
    assert found.data.metrics == {"good": 1.0, "fine": 3.0}
    assert found.info.status == "FINISHED"
    assert caplog.text.count("refuses a part") == 1


def test_a_file_that_is_not_taken_keeps_nothing_else_back(
    workplace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    job = tmp_path / "job"
    job.mkdir()
    (job / "notes.txt").write_text("seen")
    monkeypatch.setattr(tracking, "_PATIENCE_S", 0.5)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")
    with monkeypatch.context() as patch:
        patch.setattr(telling.artifacts, "store", full)
        with tracking.open_run(TrackingConfig(), "x", folder=job) as run:
            run.log_artifact(job / "notes.txt")
            run.log_metrics({"loss": 1.0}, 3)
    assert run.run_id is not None
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    found = client.get_run(run.run_id)
    assert (found.data.metrics, found.info.status) == ({"loss": 1.0}, "FINISHED")
    assert tell_rest(job, run.run_id, 5).left == 0
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["notes.txt"]


def test_a_journal_survives_half_a_line_and_is_one_processs_at_a_time(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r", {"uri": None, "where": "here"})
    outbox.append({"tags": {"a": "1"}})
    with pytest.raises(InDeliveryError):
        Outbox(tmp_path, "r")
    outbox.close()
    with (tmp_path / "tracking/r.jsonl").open("a") as stream:
        stream.write('{"metrics": {"lo')
    again = Outbox(tmp_path, "r")
    assert (again.was_there, again.address["where"]) == (True, "here")
    again.append({"metrics": {"loss": float("nan")}, "step": 1, "at": 0})
    kinds = []
    while not (batch := again.next()).is_empty:
        kinds += [next(iter(entry)) for entry in batch.entries]
        again.acknowledge(batch)
    assert kinds == ["tags", "metrics"]
    again.close()
    assert not (tmp_path / "tracking").exists()


def test_numbers_go_out_a_thousand_at_once(tmp_path: Path) -> None:
    outbox = Outbox(tmp_path, "r")
    for step in range(1200):
        outbox.append({"metrics": {"a": 1.0, "b": 2.0}, "step": step, "at": 0})
    sizes = []
    while not (batch := outbox.next()).is_empty:
        sizes.append(len(batch.entries))
        outbox.acknowledge(batch)
    assert sizes == [500, 500, 200]
    outbox.close()
