"""One tracked run, as those who have something to tell see it."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lora_exp.config import TrackingConfig
from lora_exp.credentials import holds_login, redacted
from lora_exp.machine import signals
from lora_exp.tracking import database
from lora_exp.tracking.client import client_of, environment, tracking_uri
from lora_exp.tracking.delivery import Delivery
from lora_exp.tracking.outbox import Entry, Outbox
from lora_exp.tracking.telling import Teller, as_params

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
_WITHOUT_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "MLFLOW_HTTP_REQUEST_TIMEOUT": "2"}
_LONGEST_ERROR = 5000


class Run(Protocol):
    """One tracked run. Nothing of it waits for a server."""

    @property
    def run_id(self) -> str | None: ...

    def log_params(self, params: Mapping[str, object]) -> None: ...

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None: ...

    def log_tags(self, tags: Mapping[str, str]) -> None: ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None: ...

    def log_dataset(self, facts: Mapping[str, str]) -> None: ...

    def log_model(self, name: str, params: Mapping[str, object], step: int) -> None: ...

    def stand_in(self, run_id: str) -> None: ...


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

    def stand_in(self, run_id: str) -> None:
        del run_id


class MlflowRun:
    """A run in MLflow. What it is told goes into its journal in ``folder``, and from there to MLflow.

    ``is_new``: it was made just now. Raises OSError where the disk takes no more.
    """

    def __init__(
        self, section: TrackingConfig, folder: Path, run_id: str, is_new: bool, client: MlflowClient | None = None
    ) -> None:
        uri = tracking_uri(section)
        # A login belongs to the environment, and so does an address with one.
        address = {"uri": None if holds_login(uri) else uri, "where": redacted(uri)}
        self.run_id, self._section, self._folder, self._client = run_id, section, folder, client
        self._outbox = Outbox(folder, run_id, address)
        teller = Teller(section, folder, run_id, is_new and not self._outbox.was_there, client)
        self._delivery = Delivery(self._outbox, teller.tell, redacted(uri))

    def log_params(self, params: Mapping[str, object]) -> None:
        self.put({"params": as_params(params)})

    def log_swept(self, params: Mapping[str, object]) -> None:
        """Of a sweep: what its jobs have. It may be more when the sweep is repeated."""
        self.put({"swept": as_params(params)})

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        numbers = {key: float(value) for key, value in metrics.items()}
        self.put({"metrics": numbers, "step": step, "at": _now()})

    def log_tags(self, tags: Mapping[str, str]) -> None:
        self.put({"tags": {key: redacted(value) for key, value in tags.items()}})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file, or what is in a folder. It must stay as it is until the run has ended."""
        self.put({"artifact": os.path.relpath(path, self._folder), "folder": folder})

    def log_dataset(self, facts: Mapping[str, str]) -> None:
        self.put({"dataset": {key: redacted(value) for key, value in facts.items()}})

    def log_model(self, name: str, params: Mapping[str, object], step: int) -> None:
        self.put({"model": {"name": name, "params": as_params(params), "step": step}})

    def stand_in(self, run_id: str) -> None:
        """It has what another run has that did its work: last values, data, the adapter, hashes."""
        self.put({"stands_for": run_id, "at": _now()})

    def log_status(self, status: str) -> None:
        self.put({"status": status, "at": _now()})

    def put(self, entry: Entry) -> None:
        """One line of the journal."""
        self._outbox.append(entry)
        self._delivery.wake()

    def close(self, patience_s: float) -> None:
        """Wait for MLflow to know all, but no longer than ``patience_s`` for nothing. What is left is said."""
        try:
            if not self._delivery.drain(patience_s):
                log.warning(
                    "MLflow at %s lacks %s entries of this run (%s). They are kept; to deliver them: %s",
                    redacted(tracking_uri(self._section)),
                    self._outbox.left(),
                    self._delivery.trouble[:200] or "it is slow",
                    f"python -m lora_exp task=sync run={self._folder}",
                )
        finally:
            self._outbox.close()

    def close_failed(self, status: str, error: str, patience_s: float, make_room: Callable[[], None]) -> None:
        """The same for a run that did not finish. Its status is what must be true: nothing else comes before it.

        ``make_room`` is called first, and nothing else may take what room there is on a full disk.
        """
        with self._delivery.held_back():
            make_room()
            if not self._delivery.is_failing or database.file_of(tracking_uri(self._section)) is not None:
                with contextlib.suppress(Exception), environment(_WITHOUT_PATIENCE):
                    (self._client or client_of(self._section)).set_terminated(self.run_id, status)
            with contextlib.suppress(OSError):
                self.log_tags({"error": error[:_LONGEST_ERROR]})
                self.log_status(status)
        # A second signal ends the waiting; the first error is the one to report.
        with contextlib.suppress(Exception, signals.Stopped), signals.between_steps():
            self.close(patience_s)


def _now() -> int:
    return int(time.time() * 1000)
