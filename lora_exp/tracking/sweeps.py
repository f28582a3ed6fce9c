"""The run of a sweep, which is the parent of its jobs' runs. ``sweep.json`` in its folder says which one it is."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from filelock import FileLock

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.job import SWEEP_FILE
from lora_exp.machine.claims import owner
from lora_exp.machine.process import Process
from lora_exp.tracking.client import client_of, experiment_id, tracking_uri, without_retries
from lora_exp.tracking.leftovers import tell_rest
from lora_exp.tracking.links import where_to_look
from lora_exp.tracking.outbox import outboxes
from lora_exp.tracking.stale import PROCESS_TAG, end_stale
from lora_exp.tracking.tracked import MlflowRun

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
_PATIENCE_S = 15.0


class _Sweep(TypedDict, total=False):
    """What SWEEP_FILE holds."""

    sweep_id: str
    parent_run_id: str
    uri: str | None
    experiment: str
    experiment_id: str


def parent_tags(
    client: MlflowClient, section: TrackingConfig, folder: Path, name: str | None, origin: Mapping[str, str]
) -> dict[str, str]:
    """Tags that make a run a child of the sweep in ``folder``, whose own run the first job opens."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / ".sweep.lock")):
        known = _read(folder)
        if not known.get("parent_run_id"):
            known = _open_parent(client, section, folder, name, origin, known)
            write_text(folder / SWEEP_FILE, json.dumps(known, indent=2) + "\n")
    return {"mlflow.parentRunId": known["parent_run_id"], "sweep_id": known["sweep_id"]}


def _open_parent(
    client: MlflowClient, section: TrackingConfig, folder: Path, name: str | None, origin: Mapping[str, str],
    known: _Sweep,
) -> _Sweep:  # fmt: skip
    sweep_id = known.get("sweep_id") or f"{folder.parent.name}_{folder.name}"
    process = str(owner(folder) or Process.mine())  # it lives as long as whoever launches the jobs
    tags = {**origin, "sweep_id": sweep_id, "lora_exp.kind": "sweep", PROCESS_TAG: process, "folder": str(folder)}
    experiment = experiment_id(client, section)
    parent = client.create_run(experiment, tags=tags, run_name=redacted(name or f"sweep {sweep_id}"))
    return {
        "sweep_id": sweep_id,
        "parent_run_id": parent.info.run_id,
        # A login belongs to the environment, and so does an address taken from it.
        "uri": section.uri,
        "experiment": section.experiment,
        "experiment_id": experiment,
    }


@contextlib.contextmanager
def ended_sweep(folder: Path, status: str) -> Iterator[SweepRun | None]:
    """End the sweep's run, if a job ever opened one, and let the block add what came of it.

    The status is told first, before what a full disk can stop. What the jobs could not tell is told before that.
    """
    known = _read(folder)
    if not known.get("parent_run_id"):
        yield None
        return
    # Now, and not in the run's own thread: plotly, which draws meanwhile, would find pandas half imported.
    import mlflow  # noqa: F401

    section = TrackingConfig(uri=known["uri"], experiment=known["experiment"])
    for place, run_id in outboxes(folder):
        if place != folder:
            tell_rest(place, run_id, patience_s=5, at_most_s=_PATIENCE_S)
    try:
        tracked = MlflowRun(section, folder, known["parent_run_id"], is_new=False)
    except OSError:  # no room for a journal
        client_of(section).set_terminated(known["parent_run_id"], status)
        raise
    with without_retries():
        try:
            if status != "FINISHED":  # at once: a slow machine may not get to it while somebody waits for an end
                with contextlib.suppress(Exception):
                    client_of(section).set_terminated(known["parent_run_id"], status)
            tracked.log_status(status)
            yield SweepRun(tracked, section, known.get("experiment_id"))
        finally:
            tracked.close(_PATIENCE_S)
            end_stale(client_of(section))  # of jobs whose process died


class SweepRun:
    """What a sweep's run is given at its end."""

    def __init__(self, tracked: MlflowRun, section: TrackingConfig, experiment: str | None) -> None:
        self._tracked, self._section, self._experiment = tracked, section, experiment

    def describe(self, table: str, files: list[Path]) -> None:
        """The comparison is its description."""
        self._tracked.log_tags({"mlflow.note.content": table})
        self.add(files)

    def add(self, files: list[Path]) -> None:
        """It has ``files``."""
        for file in files:
            self._tracked.log_artifact(file)

    def sum_up(self, best_run_id: str | None, params: Mapping[str, object]) -> None:
        """It has ``params`` and what its best child has. Where to look at it is said."""
        self._tracked.log_swept(params)
        if best_run_id:
            self._tracked.put({"best": best_run_id, "at": int(time.time() * 1000)})
        if self._experiment:
            log.info(where_to_look(redacted(tracking_uri(self._section)), self._experiment, self._tracked.run_id))


def _read(folder: Path) -> _Sweep:
    file = folder / SWEEP_FILE
    known: _Sweep = json.loads(file.read_text()) if file.is_file() else {}
    return known
