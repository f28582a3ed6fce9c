"""MLflow, and the only file that imports it (when first needed: it takes seconds)."""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypedDict
from urllib.parse import urlsplit

from filelock import FileLock

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import TrackingConfig
from lora_exp.credentials import NAME_ALONE, adopt_login, redacted
from lora_exp.errors import UserError
from lora_exp.job import SWEEP_FILE
from lora_exp.machine import signals
from lora_exp.machine.network import refusal
from lora_exp.tracking import artifacts, database, lineage, system_metrics
from lora_exp.tracking.links import where_to_look

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient
    from mlflow.utils.async_logging.run_operations import RunOperations

log = logging.getLogger(__name__)

DEFAULT_FOLDER = Path("outputs")
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # One writer that collects a second's worth: SQLite has one writer anyway, and training never waits.
    "MLFLOW_ASYNC_LOGGING_THREADPOOL_SIZE": "1",
    "MLFLOW_ASYNC_LOGGING_BUFFERING_SECONDS": "1",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address with the login in it
}

# For a server that is gone: what is still queued for it fails soon, one by one.
_WITHOUT_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}

# The UI then opens on training runs and not on its pages for language-model applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(UserError):
    """The tracking server cannot be reached, or would not take what it was given.

    ``result``: what the job found before that, if it came so far.
    """

    result: object = None


class Run(Protocol):
    """One tracked run."""

    @property
    def run_id(self) -> str | None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def log_dataset(self, facts: Mapping[str, str]) -> None: ...

    def log_model(self, name: str, params: Mapping[str, object], step: int) -> None: ...


@dataclass
class NoRun:
    """``tracking=none``."""

    run_id: str | None = None

    def log_params(self, params: Mapping[str, object]) -> None:
        del params

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        del metrics, step

    def log_tags(self, tags: Mapping[str, str]) -> None:
        del tags

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        del path, folder

    def log_dataset(self, facts: Mapping[str, str]) -> None:
        del facts

    def log_model(self, name: str, params: Mapping[str, object], step: int) -> None:
        del name, params, step


@dataclass
class MlflowRun:
    """A run in MLflow. Metrics go out in the background; ``flush`` waits for them. All raise ``TrackingError``."""

    client: MlflowClient
    run_id: str
    section: TrackingConfig
    _pending: list[RunOperations] = field(default_factory=list)

    def log_params(self, params: Mapping[str, object]) -> None:
        from mlflow.entities import Param

        listed = [Param(key, redacted(str(value))[:500]) for key, value in params.items()]
        with _said_clearly(self.section):
            self.client.log_batch(self.run_id, params=listed)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        batch = [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if (sent := self.client.log_batch(self.run_id, metrics=batch, synchronous=False)) is not None:
            self._pending.append(sent)

    def log_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        listed = [RunTag(key, redacted(value)) for key, value in tags.items()]
        with _said_clearly(self.section):
            self.client.log_batch(self.run_id, tags=listed)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        if (place := self._local_artifacts) is not None:
            artifacts.store(path, place / (folder or ""))
            return
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        with _said_clearly(self.section):
            send(self.run_id, str(path), folder)

    def log_dataset(self, facts: Mapping[str, str]) -> None:
        with _if_taken("data"):
            lineage.log_dataset(self.client, self.run_id, facts)

    def log_model(self, name: str, params: Mapping[str, object], step: int) -> None:
        with _if_taken("models"):
            lineage.log_model(self.client, self.run_id, name, params, step)

    @functools.cached_property
    def _local_artifacts(self) -> Path | None:
        return artifacts.local_folder(self.client.get_run(self.run_id).info.artifact_uri)

    def flush(self) -> None:
        pending, self._pending = self._pending, []
        is_gone = bool(pending) and refusal(tracking_uri(self.section)) is not None
        with _said_clearly(self.section), _environment(_WITHOUT_PATIENCE if is_gone else {}):
            for operation in pending:
                operation.wait()

    def end(self, status: str) -> None:
        """Set the status, which needs nothing else to have been taken."""
        is_gone = refusal(tracking_uri(self.section)) is not None
        with _said_clearly(self.section), _environment(_WITHOUT_PATIENCE if is_gone else {}):
            self.client.set_terminated(self.run_id, status)


class _Sweep(TypedDict, total=False):
    """What SWEEP_FILE holds."""

    sweep_id: str
    parent_run_id: str
    uri: str | None
    experiment: str


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
    with signals.at_once():
        import mlflow.tracking  # noqa: F401  # seconds
    with contextlib.ExitStack() as stack:  # but for the block: a run that has begun must be known, to be ended
        stack.enter_context(signals.while_closing())
        with _said_clearly(section):
            client = _client(section)
            origin = lineage.origin_tags()
            tags = _parent_tags(client, section, sweep_folder, sweep_name, origin) if sweep_folder else {}
            experiment = _experiment_id(client, section)
            created = client.create_run(experiment, tags=origin | tags, run_name=name)
            make_room = stack.enter_context(database.room_to_close(database.file_of(tracking_uri(section))))
        run = MlflowRun(client, created.info.run_id, section)
        try:
            with signals.between_steps():
                with system_metrics.sampled(run.log_metrics, section.system_metrics):
                    yield run
                run.flush()
        except BaseException as error:
            stop = signals.stop_behind(error)
            status = "KILLED" if stop is not None or not isinstance(error, Exception) else "FAILED"
            make_room()
            _close(run, status, str(stop or error) or type(error).__name__)
            raise
        else:
            run.end("FINISHED")
        finally:
            if sweep_folder is None:
                log.info(where_to_look(tracking_uri(section), experiment, run.run_id))


def end_sweep(folder: Path, status: str) -> None:
    """Set the status of the sweep's parent run, if a job ever opened one."""
    if (run := _parent(folder)) is not None:
        run.end(status)


def describe_sweep(folder: Path, table: str, files: list[Path]) -> None:
    """Give the sweep's parent run, if a job ever opened one, the comparison as its description."""
    if (run := _parent(folder)) is None:
        return
    run.log_tags({"mlflow.note.content": table})
    for file in files:
        run.log_artifact(file)


def sum_up_sweep(folder: Path, best_run_id: str | None, params: Mapping[str, object]) -> None:
    """Give the sweep's parent run ``params`` and what its best child has, and say where to look at it."""
    if (run := _parent(folder)) is None:
        return
    run.log_params(params)
    if best_run_id:
        with _said_clearly(run.section):
            _take_over(run, run.client.get_run(best_run_id))
    with _said_clearly(run.section):
        experiment = _experiment_id(run.client, run.section)
    log.info(where_to_look(tracking_uri(run.section), experiment, run.run_id))


def _take_over(run: MlflowRun, best: StoredRun) -> None:
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
    return database.address(DEFAULT_FOLDER / "mlflow.db")


def _client(section: TrackingConfig) -> MlflowClient:
    adopt_login()
    uri = tracking_uri(section)
    if uri.startswith("http") and urlsplit(uri).query:
        raise TrackingError(
            "The tracking address has a query (?…), which MLflow cannot use: leave it out, and put a token into "
            "MLFLOW_TRACKING_TOKEN"
        )
    _check_reachable(uri)
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)
    from mlflow.tracking import MlflowClient

    _send_name_alone()
    for noisy in ("mlflow", "alembic"):  # after the import, which sets mlflow's own level
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # errors are raised too, and said once
    if (file := database.file_of(uri)) is not None:
        database.ensure(file, lambda address: MlflowClient(address).search_experiments(max_results=1))
    return MlflowClient(uri)


def _send_name_alone() -> None:
    """A login that is a token in the place of the user: MLflow has no variable for it, but takes headers."""
    if not os.environ.get(NAME_ALONE):
        return
    from mlflow.tracking.request_header import registry
    from mlflow.tracking.request_header.abstract_request_header_provider import RequestHeaderProvider

    class NameAlone(RequestHeaderProvider):
        def in_context(self) -> bool:
            return bool(os.environ.get(NAME_ALONE))

        def request_headers(self) -> dict[str, str]:
            login = base64.b64encode(f"{os.environ[NAME_ALONE]}:".encode()).decode()
            return {"Authorization": f"Basic {login}"}

    if not any(type(known).__name__ == NameAlone.__name__ for known in registry._request_header_provider_registry):
        registry._request_header_provider_registry.register(NameAlone)


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
        file = database.file_of(tracking_uri(section))
        place = (file.parent / "mlartifacts").as_uri() if file else None
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
            write_text(folder / SWEEP_FILE, json.dumps(known, indent=2) + "\n")
    return {"mlflow.parentRunId": known["parent_run_id"], "sweep_id": known["sweep_id"]}


def _read_sweep(folder: Path) -> _Sweep:
    file = folder / SWEEP_FILE
    known: _Sweep = json.loads(file.read_text()) if file.is_file() else {}
    return known


def _parent(folder: Path) -> MlflowRun | None:
    known = _read_sweep(folder)
    if not known.get("parent_run_id"):
        return None
    section = TrackingConfig(uri=known["uri"], experiment=known["experiment"])
    with _said_clearly(section):
        return MlflowRun(_client(section), known["parent_run_id"], section)


def _close(run: MlflowRun, status: str, error: str) -> None:
    """End a run that did not finish. Its status is what must be true: no tag and no lost metric comes before it."""
    # A second signal ends the waiting; the first error is the one to report, tracking or not.
    with contextlib.suppress(Exception, signals.Stopped), signals.between_steps():
        run.flush()
    try:
        run.end(status)
        run.log_tags({"error": error[:5000]})
    except TrackingError as problem:
        log.warning("MLflow run %s could not be marked %s: %s", run.run_id, status, problem)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


@contextlib.contextmanager
def _said_clearly(section: TrackingConfig) -> Iterator[None]:
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        where, reason = redacted(tracking_uri(section)), str(error).partition("\n[SQL")[0]
        raise TrackingError(
            f"MLflow at {where} failed ({redacted(reason)[:500]}): mend the server, or run without it by tracking=none"
        ) from error


@contextlib.contextmanager
def _if_taken(what: str) -> Iterator[None]:
    """For columns of MLflow's lists: an older server that knows none of them must not cost a run."""
    try:
        yield
    except Exception as error:
        log.warning("MLflow does not list this run's %s: %s", what, redacted(str(error))[:200])
