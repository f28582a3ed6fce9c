"""MLflow's client: where it points, how it logs in, and what is said when it cannot be used."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from lora_exp.config import TrackingConfig
from lora_exp.credentials import NAME_ALONE, adopt_login, redacted
from lora_exp.errors import UserError
from lora_exp.machine.network import refusal
from lora_exp.tracking import database

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

DEFAULT_FOLDER = Path("outputs")
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # it prints the address with the login in it
}
_CAUSE = re.compile(r"\[Errno \d+\] [\w ]+|Read timed out|Connection aborted")
# The UI then opens on training runs and not on its pages for language-model applications.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class TrackingError(UserError):
    """The tracking server cannot be reached, or would not take what it was given."""


def tracking_uri(section: TrackingConfig) -> str:
    """``tracking.uri``, else $MLFLOW_TRACKING_URI, else SQLite in ./outputs."""
    if section.uri or os.environ.get("MLFLOW_TRACKING_URI"):
        return section.uri or os.environ["MLFLOW_TRACKING_URI"]
    return database.address(DEFAULT_FOLDER / "mlflow.db")


def connect(section: TrackingConfig) -> MlflowClient:
    """A client of ``section``'s store, whose address is put into it."""
    section.uri = tracking_uri(section)
    with said_clearly(section):
        return checked_client(section)


def checked_client(section: TrackingConfig) -> MlflowClient:
    """A client of a store that answers."""
    adopt_login()
    uri = tracking_uri(section)
    if uri.startswith("http") and urlsplit(uri).query:
        raise TrackingError(
            "The tracking address has a query (?…), which MLflow cannot use: leave it out, and put a token into "
            "MLFLOW_TRACKING_TOKEN"
        )
    _check_reachable(uri)
    return client_of(section)


def client_of(section: TrackingConfig) -> MlflowClient:
    """A client of a store that may be away just now."""
    adopt_login()
    uri = tracking_uri(section)
    set_defaults()
    from mlflow.tracking import MlflowClient

    _send_name_alone()
    for noisy in ("mlflow", "alembic"):  # after the import, which sets mlflow's own level
        logging.getLogger(noisy).setLevel(logging.CRITICAL)  # errors are raised too, and said once
    if (file := database.file_of(uri)) is not None:
        database.ensure(file, lambda address: MlflowClient(address).search_experiments(max_results=1))
    with database.one_at_a_time(uri):
        return MlflowClient(uri)


def experiment_id(client: MlflowClient, section: TrackingConfig) -> str:
    """The number of ``tracking.experiment``, which is made if it is not there."""
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


def newest_experiments(client: MlflowClient) -> list[tuple[str, str]]:
    """Number and name of each experiment with a run, that with the newest first."""
    named = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    newest = {}
    for number in named:
        for run in client.search_runs([number], max_results=1, order_by=["attributes.start_time DESC"]):
            newest[number] = run.info.start_time
    return [(number, named[number]) for number in sorted(newest, key=lambda number: -newest[number])]


@contextlib.contextmanager
def said_clearly(section: TrackingConfig) -> Iterator[None]:
    """Turn any error of a block into one of ours."""
    try:
        yield
    except TrackingError:
        raise
    except Exception as error:
        where = redacted(tracking_uri(section))
        raise TrackingError(
            f"MLflow at {where} failed ({reason(error)}): mend the server, or run without it by tracking=none"
        ) from error


def reason(error: Exception) -> str:
    """What an error says, for a line: MLflow's may go on for pages of SQL or HTML, or of who called whom."""
    text = str(error).partition("\n[SQL")[0]
    if "API request to" in text and (cause := _CAUSE.search(text)):
        text = cause[0]
    return redacted(text)[:500]


@contextlib.contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that MLflow reads at each call, for a block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def set_defaults() -> None:
    """Where the user's environment has no wish of its own. Call it before any ``environment``, which takes back."""
    for key, value in _DEFAULTS.items():
        os.environ.setdefault(key, value)


def without_retries() -> contextlib.AbstractContextManager[None]:
    """For a delivery, which tries again itself and must know at once what failed."""
    set_defaults()
    return environment({"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"})


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
