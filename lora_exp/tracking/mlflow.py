"""A job's run in MLflow, from its opening to its end. MLflow is imported when first needed: it takes seconds."""

from __future__ import annotations

import contextlib
import logging
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.config import TrackingConfig
from lora_exp.credentials import redacted
from lora_exp.errors import RefusedError
from lora_exp.machine import signals
from lora_exp.machine.process import Process
from lora_exp.tracking import database, lineage, system_metrics
from lora_exp.tracking.client import TrackingError as TrackingError
from lora_exp.tracking.client import checked_client, experiment_id, said_clearly, tracking_uri, without_retries
from lora_exp.tracking.finished import PRUNED_TAG
from lora_exp.tracking.links import where_to_look
from lora_exp.tracking.stale import PROCESS_TAG, end_stale
from lora_exp.tracking.sweeps import ended_sweep as ended_sweep
from lora_exp.tracking.sweeps import parent_tags
from lora_exp.tracking.telling import is_missing
from lora_exp.tracking.tracked import MlflowRun, NoRun
from lora_exp.tracking.tracked import Run as Run

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
_PATIENCE_S = 15.0  # with a server that does not answer, at the end of a run
_PATIENCE_AT_FAILURE_S = 5.0


@dataclass(frozen=True)
class Sweep:
    """What a job's run belongs to: the sweep in ``folder``, whose own run is called ``name``."""

    folder: Path
    name: str | None


@contextlib.contextmanager
def open_run(
    section: TrackingConfig,
    name: str,
    sweep_folder: Path | None = None,
    sweep_name: str | None = None,
    folder: Path | None = None,
    run_id: str | None = None,
) -> Iterator[Run]:
    """A run that ends as its block ends: FINISHED, FAILED (an exception) or KILLED (SIGINT, SIGTERM).

    In a sweep it is a child of the sweep's run, which is called ``sweep_name``. ``folder`` is the job's, where what
    MLflow lacks is kept. ``run_id``: go on with that run. Raises TrackingError before anything else happens when the
    server cannot be reached; later on a server that fails costs nothing but a warning.
    """
    if not section.enabled:
        yield NoRun()
        return
    with signals.at_once():
        import mlflow.tracking  # noqa: F401  # seconds
    sweep = Sweep(sweep_folder, sweep_name) if sweep_folder else None
    with contextlib.ExitStack() as stack:  # but for the block: a run that has begun must be known, to be ended
        stack.enter_context(signals.while_closing())
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        with said_clearly(section):
            client = checked_client(section)
            end_stale(client)
            stored = _reopened(client, section, run_id, sweep) if run_id else _created(client, section, name, sweep)
        stack.enter_context(without_retries())
        with _failed_if_not_begun(client, stored.info.run_id):
            make_room = stack.enter_context(database.room_to_close(database.file_of(tracking_uri(section))))
            run = MlflowRun(section, place, stored.info.run_id, is_new=run_id is None, client=client)
        try:
            with signals.between_steps():
                if run_id:
                    run.log_status("RUNNING")  # behind an end that an earlier process could not tell
                began = stored.info.start_time
                with system_metrics.sampled(run.log_metrics, began, section.system_metrics):
                    yield run
        except BaseException as error:
            stop = signals.stop_behind(error)
            status = "KILLED" if stop is not None or not isinstance(error, Exception) else "FAILED"
            said = str(stop or error) or type(error).__name__
            run.close_failed(status, said, _PATIENCE_AT_FAILURE_S, make_room)
            raise
        else:
            run.log_status("FINISHED")
            run.close(_PATIENCE_S)
        finally:
            if sweep is None:
                log.info(where_to_look(tracking_uri(section), stored.info.experiment_id, run.run_id))


def _created(client: MlflowClient, section: TrackingConfig, name: str, sweep: Sweep | None) -> StoredRun:
    tags = {**_belonging(client, section, sweep), **lineage.origin_tags(), PROCESS_TAG: str(Process.mine())}
    return client.create_run(experiment_id(client, section), tags=tags, run_name=redacted(name))


def _belonging(client: MlflowClient, section: TrackingConfig, sweep: Sweep | None) -> dict[str, str]:
    return parent_tags(client, section, sweep.folder, sweep.name, lineage.origin_tags()) if sweep else {}


def _reopened(client: MlflowClient, section: TrackingConfig, run_id: str, sweep: Sweep | None) -> StoredRun:
    """It belongs to the sweep that it is gone on with in."""
    try:
        client.update_run(run_id, "RUNNING")
    except Exception as error:
        if not is_missing(error):
            raise
        raise TrackingError(
            f"MLflow has no run {run_id} to go on with: mend tracking.uri, or start anew in another folder"
        ) from error
    for name, value in {**_belonging(client, section, sweep), PROCESS_TAG: str(Process.mine())}.items():
        client.set_tag(run_id, name, value)
    found = client.get_run(run_id)
    for tag in {"error", PRUNED_TAG} & set(found.data.tags):  # of its end that was none
        client.delete_tag(run_id, tag)
    return found


@contextlib.contextmanager
def _failed_if_not_begun(client: MlflowClient, run_id: str) -> Iterator[None]:
    """A run that was made but cannot be begun (a full disk) must not stay open."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(Exception):
            client.set_terminated(run_id, "FAILED")
        raise


def folder_of(section: TrackingConfig, run_id: str) -> Path:
    """Where a run's files were written. Raises RefusedError for a run that the store has not."""
    with said_clearly(section), without_retries():
        client = checked_client(section)
        try:
            return Path(client.get_run(run_id).data.tags.get("folder", ""))
        except Exception as error:
            if not is_missing(error):
                raise
    raise RefusedError(f"MLflow has no run {run_id}: mend tracking.uri, or give the folder of the run")
