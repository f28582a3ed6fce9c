"""How each line of an outbox is told to MLflow, so that telling it twice is as good as once."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.tracking import artifacts, lineage
from lora_exp.tracking.client import client_of, reason
from lora_exp.tracking.outbox import Entry

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
_CHUNK = 100  # params and tags that MLflow takes in one call
_NOT_THE_CONTENT = (401, 403, 408, 429, 499)  # of a client's errors, those that may pass
_NO_SUCH_CALL = ("ENDPOINT_NOT_FOUND", "NOT_IMPLEMENTED")  # of an older server
_NOWHERE = -1 << 62


class GoneError(Exception):
    """The run was deleted, or this store never had it."""


class Teller:
    """Tells a run's lines to MLflow. Raises what MLflow raises where a later try may succeed; what MLflow refuses for
    what it is, is left out with a warning.

    A point is told once for each metric and step. ``is_new``: nothing of the run was told before, so that MLflow need
    not be asked what it has; it is asked after each failure, as a call may have been taken though its answer was lost.
    """

    def __init__(
        self, section: TrackingConfig, folder: Path, run_id: str, is_new: bool, client: MlflowClient | None = None
    ) -> None:
        self._section, self._folder, self._run_id, self._given = section, folder, run_id, client
        self._newest: dict[str, int] | None = {} if is_new else None  # None: to be asked
        self._held: dict[str, set[int]] = {}
        self.refused = 0

    def tell(self, entries: Sequence[Entry]) -> None:
        """All entries are of one kind, and several only of numbers."""
        try:
            if "metrics" in entries[0]:
                self._tell_points(entries)
            else:
                self._tell_one(entries[0])
        except Exception:
            self._newest = None
            self._held.clear()
            raise

    @functools.cached_property
    def client(self) -> MlflowClient:
        return self._given or client_of(self._section)

    def _tell_points(self, entries: Sequence[Entry]) -> None:
        from mlflow.entities import Metric

        points: dict[tuple[str, int], Metric] = {}
        for entry in entries:
            for key, value in entry["metrics"].items():
                point = Metric(key, float(value), entry["at"], entry["step"])
                points.setdefault((key, entry["step"]), point)
        fresh = [point for point in points.values() if not self._has(point.key, point.step)]
        self._each_that_is_taken(fresh, lambda part: self.client.log_batch(self._run_id, metrics=part))
        for point in fresh:
            assert self._newest is not None
            self._newest[point.key] = max(point.step, self._newest.get(point.key, _NOWHERE))
            if point.key in self._held:
                self._held[point.key].add(point.step)

    def _has(self, key: str, step: int) -> bool:
        """Whether MLflow has the point. Steps mostly rise, so that the newest one of a metric mostly decides."""
        if self._newest is None:
            self._newest = self._ask_newest()
        if step > self._newest.get(key, _NOWHERE):
            return False
        if key not in self._held:
            history = self.client.get_metric_history(self._run_id, key)
            self._held[key] = {point.step for point in history}
        return step in self._held[key]

    def _ask_newest(self) -> dict[str, int]:
        stored: Sequence[Metric] = self.client.get_run(self._run_id).data._metric_objs
        return {point.key: point.step for point in stored}

    def _tell_one(self, entry: Entry) -> None:
        for kind, tell in self._kinds.items():
            if kind in entry:
                tell(entry)

    @property
    def _kinds(self) -> dict[str, Callable[[Entry], None]]:
        return {
            "params": self._tell_params,
            "swept": self._tell_swept,
            "tags": self._tell_tags,
            "artifact": self._tell_artifact,
            "dataset": self._tell_dataset,
            "model": self._tell_model,
            "best": self._tell_best,
            "stands_for": self._tell_stands_for,
            "status": self._tell_status,
        }

    def _tell_params(self, entry: Entry) -> None:
        from mlflow.entities import Param

        listed = [Param(key, value) for key, value in entry["params"].items()]
        self._each_that_is_taken(listed, lambda part: self.client.log_batch(self._run_id, params=part), _CHUNK)

    def _tell_swept(self, entry: Entry) -> None:
        """As params; those that MLflow holds with another value, which it never changes, as tags ``swept.NAME``."""
        held = self.client.get_run(self._run_id).data.params
        changed = {key: value for key, value in entry["swept"].items() if held.get(key, value) != value}
        self._tell_params({"params": {key: value for key, value in entry["swept"].items() if key not in changed}})
        if changed:
            self._tell_tags({"tags": {f"swept.{key}": value for key, value in changed.items()}})

    def _tell_tags(self, entry: Entry) -> None:
        from mlflow.entities import RunTag

        listed = [RunTag(key, value) for key, value in entry["tags"].items()]
        self._each_that_is_taken(listed, lambda part: self.client.log_batch(self._run_id, tags=part), _CHUNK)

    def _tell_artifact(self, entry: Entry) -> None:
        path, folder = self._folder / entry["artifact"], entry["folder"]
        if not path.exists():
            log.warning("%s is not there any more, so MLflow does not get it", path)
        elif self._local_artifacts is not None:
            artifacts.store(path, self._local_artifacts / (folder or ""))
        else:
            send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
            self._each_that_is_taken([path], lambda _: send(self._run_id, str(path), folder))

    def _tell_dataset(self, entry: Entry) -> None:
        with _if_taken("data"):
            try:
                lineage.log_dataset(self.client, self._run_id, entry["dataset"])
            except Exception as error:
                if "unique constraint" not in str(error).lower():
                    raise
                # Another job has just listed the same data, which MLflow looks for before it lists it.
                lineage.log_dataset(self.client, self._run_id, entry["dataset"])

    def _tell_model(self, entry: Entry) -> None:
        with _if_taken("models"):
            lineage.log_model(self.client, self._run_id, **entry["model"])

    def _tell_best(self, entry: Entry) -> None:
        """Of a sweep: the last values of its best run's metrics, each at its own step, its data and its adapter."""
        best = self._tell_of(entry["best"], entry["at"])
        self._tell_tags({"tags": {"best_run_id": best.info.run_id, "best_run_name": redacted(best.info.run_name)}})

    def _tell_stands_for(self, entry: Entry) -> None:
        """Of a job that is not run again: what the run has that did its work, what was found out about it, too."""
        earlier = self._tell_of(entry["stands_for"], entry["at"])
        own = self.client.get_run(self._run_id).data.tags
        found = {key: value for key, value in earlier.data.tags.items() if key not in own and _is_found(key)}
        self._tell_tags({"tags": found})

    def _tell_of(self, run_id: str, at: int) -> StoredRun:
        """The last values of a run's metrics, each at its own step, its data and its adapter. Returns the run."""
        from mlflow.entities import Metric

        other = self.client.get_run(run_id)
        held = self.client.get_run(self._run_id).data.metrics  # of an earlier best one, too
        points = [
            Metric(point.key, point.value, at, point.step)
            for point in other.data._metric_objs
            if not point.key.startswith("system/") and held.get(point.key) != point.value
        ]
        self._each_that_is_taken(points, lambda part: self.client.log_batch(self._run_id, metrics=part))
        self._newest = None  # to be asked again: these were told past it
        self._held.clear()
        with _if_taken("data and models"):
            lineage.take_over(self.client, self._run_id, other)
        return other

    def _tell_status(self, entry: Entry) -> None:
        if entry["status"] == "RUNNING":
            self._each_that_is_taken(["RUNNING"], lambda _: self.client.update_run(self._run_id, "RUNNING"))
        else:
            end = lambda _: self.client.set_terminated(self._run_id, entry["status"], entry["at"])  # noqa: E731
            self._each_that_is_taken([entry["status"]], end)

    @functools.cached_property
    def _local_artifacts(self) -> Path | None:
        return artifacts.local_folder(self.client.get_run(self._run_id).info.artifact_uri)

    def _each_that_is_taken(
        self, things: Sequence[Any], send: Callable[[Sequence[Any]], object], most: int = 1 << 30
    ) -> None:
        """Send as many as go at once, and of those that are refused all but the ones to blame."""
        for start in range(0, len(things), most):
            part = things[start : start + most]
            try:
                send(part)
            except Exception as error:
                if not _is_refusal(error):
                    raise
                self._check_there(error)
                if len(part) > 1:
                    self._each_that_is_taken(part, send, (len(part) + 1) // 2)
                else:
                    self._note_refused(error)

    def _check_there(self, error: Exception) -> None:
        try:
            stage = self.client.get_run(self._run_id).info.lifecycle_stage
        except Exception as problem:
            if not is_missing(problem):
                raise
            raise GoneError(f"run {self._run_id} is not there") from error
        if stage != "active":
            raise GoneError(f"run {self._run_id} was deleted") from error

    def _note_refused(self, error: Exception) -> None:
        if not self.refused:
            log.warning("MLflow refuses a part of the run's record, which is left out: %s", reason(error))
        self.refused += 1


def _is_found(tag: str) -> bool:
    """Whether a tag says what a run found out, and neither who made it nor how it ended."""
    return tag.startswith("machine.") or tag.endswith(("sha256", "fingerprint"))


def is_missing(error: Exception) -> bool:
    """Whether MLflow has no such run."""
    return getattr(error, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"


def _is_refusal(error: Exception) -> bool:
    """Whether MLflow, being well, will not take it, now or later."""
    from mlflow.exceptions import MlflowException

    if not isinstance(error, MlflowException) or error.error_code == "ENDPOINT_NOT_FOUND":  # as a proxy may say
        return False
    status = error.get_http_status_code()
    return 400 <= status < 500 and status not in _NOT_THE_CONTENT


def _may_pass(error: Exception) -> bool:
    """Whether it is a failure to reach a server that knows the call."""
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException):
        return error.error_code not in _NO_SUCH_CALL and not _is_refusal(error)
    return isinstance(error, OSError)


@contextlib.contextmanager
def _if_taken(what: str) -> Iterator[None]:
    """For columns of MLflow's lists: an older server that knows none of them must not cost a run."""
    try:
        yield
    except Exception as error:
        if _may_pass(error):
            raise
        log.warning("MLflow does not list this run's %s: %s", what, reason(error)[:200])


def as_params(params: Mapping[str, object]) -> dict[str, str]:
    """Values as MLflow takes them, without a login in them."""
    return {key: redacted(str(value))[:500] for key, value in params.items()}
