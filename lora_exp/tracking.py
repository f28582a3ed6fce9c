"""MLflow, and the only file that imports it (when first needed: it takes seconds)."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from filelock import FileLock

from lora_exp import artifacts, lineage, system_metrics
from lora_exp.config import TrackingConfig
from lora_exp.links import where_to_look
from lora_exp.network import refusal
from lora_exp.provenance import redacted

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)

SWEEP_FILE = "sweep.json"
DEFAULT_FOLDER = Path("outputs")
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # One writer that collects a second's worth: SQLite has one writer anyway, and training never waits.
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "1",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",
}

# The UI then opens on training runs and not on its pages for language-model applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(ValueError):
    """The tracking server cannot be reached, or would not take what it was given."""


class Run(Protocol):
    """One tracked run."""

    @property
    def run_id(self) -> str | None: ...

    def log_params(self, params: Mapping[str, Any]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def log_dataset(self, facts: Mapping[str, str]) -> None: ...

    def log_model(self, name: str, params: Mapping[str, Any], step: int) -> None: ...


@dataclass
class NoRun:
    """``tracking=none``."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, Any]) -> None:
        del params

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        del metrics, step

    def log_tags(self, tags: Mapping[str, str]) -> None:
        del tags

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        del path, folder

    def log_dataset(self, facts: Mapping[str, str]) -> None:
        del facts

    def log_model(self, name: str, params: Mapping[str, Any], step: int) -> None:
        del name, params, step


@dataclass
class MlflowRun:
    """A run in MLflow. Metrics go out in the background; ``flush`` waits for them."""

    client: MlflowClient
    run_id: str
    _pending: list[Any] = field(default_factory=list)

    def log_params(self, params: Mapping[str, Any]) -> None:
        from mlflow.entities import Param

        self.client.log_batch(self.run_id, params=[Param(key, str(value)[:500]) for key, value in params.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        self._pending.append(self.client.log_batch(self.run_id, metrics=batch, synchronous=False))

    def log_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(self.run_id, tags=[RunTag(key, redacted(value)) for key, value in tags.items()])

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if (place := self._local_artifacts) is not None:
            artifacts.store(path, place / (folder or ""))
            return
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        send(self.run_id, str(path), folder)

    def log_dataset(self, facts: Mapping[str, str]) -> None:
        with _if_taken("data"):
            lineage.log_dataset(self.client, self.run_id, facts)

    def log_model(self, name: str, params: Mapping[str, Any], step: int) -> None:
        with _if_taken("models"):
            lineage.log_model(self.client, self.run_id, name, params, step)

    @functools.cached_property
    def _local_artifacts(self) -> Path | None:
        return artifacts.local_folder(self.client.get_run(self.run_id).info.artifact_uri)

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        for operation in pending:
            operation.wait()


@contextlib.contextmanager
def open_run(
    section: TrackingConfig, name: str, sweep_folder: Path | None = None, sweep_name: str | None = None
) -> Iterator[Run]:
    """A run that ends as its block ends: FINISHED, FAILED (an exception) or KILLED (SIGINT, SIGTERM).

    In a sweep it is a child of the sweep's run, which is called ``sweep_name``. Raises TrackingError before anything
    else happens when the server cannot be reached.
    """
    if not section.enabled:
        yield NoRun()
        return
    with _said_clearly(section):
        client = _client(section)
        origin = lineage.origin_tags()
        tags = _parent_tags(client, section, sweep_folder, sweep_name, origin) if sweep_folder else {}
        experiment = _experiment_id(client, section)
        created = client.create_run(experiment, tags=origin | tags, run_name=name)
    run = MlflowRun(client, created.info.run_id)
    try:
        with system_metrics.sampled(run.log_metrics):
            yield run
        with _said_clearly(section):
            run.flush()
    except BaseException as error:
        status = "FAILED" if isinstance(error, Exception) else "KILLED"
        with contextlib.suppress(Exception):  # the first error is the one to report, tracking or not
            run.flush()
        _terminate(run, status, str(error) or type(error).__name__)
        raise
    else:
        _terminate(run, "FINISHED")
    finally:
        if sweep_folder is None:
            log.info(where_to_look(tracking_uri(section), experiment, run.run_id))


def close_sweep(folder: Path, status: str, table: str, files: list[Path]) -> None:
    """End the sweep's parent run, if a job ever opened it, with the comparison as its description."""
    known = _read_sweep(folder)
    if not known.get("parent_run_id"):
        return
    section = TrackingConfig(uri=known["uri"], experiment=known["experiment"])
    with _said_clearly(section):
        run = MlflowRun(_client(section), known["parent_run_id"])
        for file in files:
            run.log_artifact(file)
        run.log_tags({"mlflow.note.content": table})
        run.client.set_terminated(run.run_id, status)


def sum_up_sweep(folder: Path, best_run_id: str | None, params: Mapping[str, Any]) -> None:
    """Give the sweep's parent run ``params`` and what its best child has, and say where to look at it."""
    known = _read_sweep(folder)
    if not known.get("parent_run_id"):
        return
    section = TrackingConfig(uri=known["uri"], experiment=known["experiment"])
    with _said_clearly(section):
        run = MlflowRun(_client(section), known["parent_run_id"])
        run.log_params(params)
        if best_run_id:
            _take_over(run, run.client.get_run(best_run_id))
        log.info(where_to_look(tracking_uri(section), _experiment_id(run.client, section), run.run_id))


def _take_over(run: MlflowRun, best: Any) -> None:
    """The last values of ``best``'s metrics, each at its own step, its data and its adapter."""
    for name in best.data.metrics:
        if not name.startswith("system/"):
            last = max(run.client.get_metric_history(best.info.run_id, name), key=lambda metric: metric.step)
            run.log_metrics({name: last.value}, last.step)
    with _if_taken("data and models"):
        if best.inputs and best.inputs.dataset_inputs:
            run.client.log_inputs(run.run_id, best.inputs.dataset_inputs)
        if best.outputs and best.outputs.model_outputs:
            run.client.log_outputs(run.run_id, best.outputs.model_outputs)
    run.log_tags({"best_run_id": best.info.run_id, "best_run_name": best.info.run_name})
    run.flush()


def connect(section: TrackingConfig) -> MlflowClient:
    """A client of ``section``'s store, whose address is put into it."""
    section.uri = tracking_uri(section)
    with _said_clearly(section):
        return _client(section)


def newest_experiments(client: MlflowClient) -> list[tuple[str, str]]:
    """Number and name of each experiment with a run, that with the newest first."""
    named = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    newest = {}
    for number in named:
        for run in client.search_runs([number], max_results=1, order_by=["attributes.start_time DESC"]):
            newest[number] = run.info.start_time
    return [(number, named[number]) for number in sorted(newest, key=lambda number: -newest[number])]


def tracking_uri(section: TrackingConfig) -> str:
    """``tracking.uri``, else $MLFLOW_TRACKING_URI, else SQLite in ./outputs."""
    if section.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return section.uri or os.environ["MLFLOW_TRACKING_URI"]
    return f"sqlite:///{(DEFAULT_FOLDER / 'mlflow.db').resolve()}"


def _client(section: TrackingConfig) -> MlflowClient:
    uri = tracking_uri(section)
    _check_reachable(uri)
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    for noisy in ("mlflow", "alembic"):  # after the import, which sets mlflow's own level
        logging.getLogger(noisy).setLevel(logging.ERROR)
    database = _database(uri)
    if database is None:
        return MlflowClient(uri)
    database.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{database}.lock"):  # two processes that both create the schema break it
        client = MlflowClient(uri)
        client.search_experiments(max_results=1)
    return client


def _check_reachable(uri: str) -> None:
    parts = urlsplit(uri)
    if (error := refusal(uri)) is not None:
        port = parts.port or (443 if parts.scheme == "https" else 80)
        raise TrackingError(
            f"The tracking server {parts.scheme}://{parts.hostname}:{port} cannot be reached ({error}): start it, "
            "mend tracking.uri, or run without it by tracking=none"
        ) from error


def _experiment_id(client: MlflowClient, section: TrackingConfig) -> str:
    from mlflow.exceptions import MlflowException

    found = client.get_experiment_by_name(section.experiment)
    if found is None:
        database = _database(tracking_uri(section))
        place = (database.parent / "mlartifacts").as_uri() if database else None
        try:
            return str(client.create_experiment(section.experiment, artifact_location=place, tags=_EXPERIMENT_TAGS))
        except MlflowException:  # another process was first
            found = client.get_experiment_by_name(section.experiment)
            if found is None:
                raise
    if found.lifecycle_stage != "active":
        raise TrackingError(
            f"tracking.experiment={section.experiment} was deleted in MLflow: restore it "
            f"(mlflow experiments restore -x {found.experiment_id}) or choose another name"
        )
    return str(found.experiment_id)


def _parent_tags(
    client: MlflowClient, section: TrackingConfig, folder: Path, name: str | None, origin: Mapping[str, str]
) -> dict[str, str]:
    """Tags that make a run a child of the sweep in ``folder``, whose own run the first job opens."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / ".sweep.lock")):
        known = _read_sweep(folder)
        if not known.get("parent_run_id"):
            sweep_id = known.get("sweep_id") or f"{folder.parent.name}_{folder.name}"
            tags = {**origin, "sweep_id": sweep_id, "lora_exp.kind": "sweep"}
            title = name or f"sweep {sweep_id}"
            parent = client.create_run(_experiment_id(client, section), tags=tags, run_name=title)
            known = {
                "sweep_id": sweep_id,
                "parent_run_id": parent.info.run_id,
                # A login belongs to the environment, and so does an address taken from it.
                "uri": section.uri,
                "experiment": section.experiment,
            }
            (folder / SWEEP_FILE).write_text(json.dumps(known, indent=2) + "\n")
    return {"mlflow.parentRunId": known["parent_run_id"], "sweep_id": known["sweep_id"]}


def _read_sweep(folder: Path) -> dict[str, Any]:
    file = folder / SWEEP_FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def _terminate(run: MlflowRun, status: str, error: str | None = None) -> None:
    try:
        if error:
            run.log_tags({"error": error[:5000]})
        run.client.set_terminated(run.run_id, status)
    except Exception as problem:
        log.warning("MLflow run %s could not be marked %s: %s", run.run_id, status, redacted(str(problem)))


def _database(uri: str) -> Path | None:
    return Path(uri.removeprefix("sqlite:///")).resolve() if uri.startswith("sqlite:///") else None


@contextlib.contextmanager
def _said_clearly(section: TrackingConfig) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        where = redacted(tracking_uri(section))
        raise TrackingError(
            f"MLflow at {where} failed ({redacted(str(error))[:500]}): mend the server, or run without it by "
            "tracking=none"
        ) from error


@contextlib.contextmanager
def _if_taken(what: str) -> Iterator[None]:
    """For columns of MLflow's lists: an older server that knows none of them must not cost a run."""
    try:
        yield
    except Exception as error:
        log.warning("MLflow does not list this run's %s: %s", what, redacted(str(error))[:200])
