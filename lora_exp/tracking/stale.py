"""Runs that no living process will ever end: they are marked as killed by whoever comes next."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.machine.process import Process
from lora_exp.tracking.client import reason
from lora_exp.tracking.leftovers import tell_rest
from lora_exp.tracking.outbox import FOLDER

if TYPE_CHECKING:
    from mlflow.entities import Run as StoredRun
    from mlflow.tracking import MlflowClient

log = logging.getLogger(__name__)
PROCESS_TAG = "lora_exp.process"
_AT_MOST_S = 10.0


def end_stale(client: MlflowClient) -> int:
    """End every run in the store whose process was this host's and is gone. Returns how many there were.

    What they had not told yet is told first, their own end included. Never fails: a run is worth more than its past.
    """
    try:
        stale = [run for run in _running(client) if _is_stale(run)]
        ended = [run.info.run_name for run in stale if _end(client, run)]
    except Exception as error:
        log.debug("stale runs were not looked for: %s", reason(error))
        return 0
    if ended:
        names = ", ".join(f"'{name}'" for name in ended[:3]) + (", …" if len(ended) > 3 else "")
        count = "An MLflow run was" if len(ended) == 1 else f"{len(ended)} MLflow runs were"
        log.warning("%s left RUNNING by a process that is gone, and marked KILLED: %s", count, names)
    return len(ended)


def _running(client: MlflowClient) -> list[StoredRun]:
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000))


def _is_stale(run: StoredRun) -> bool:
    process = Process.read(run.data.tags.get(PROCESS_TAG, ""))
    return process is not None and process.is_gone()


def _end(client: MlflowClient, run: StoredRun) -> bool:
    run_id, process = run.info.run_id, Process.read(run.data.tags[PROCESS_TAG])
    folder = Path(run.data.tags.get("folder", ""))
    if list((folder / FOLDER).glob(f"{run_id}.jsonl")):
        tell_rest(folder, run_id, patience_s=_AT_MOST_S, at_most_s=_AT_MOST_S)
    if client.get_run(run_id).info.status != "RUNNING":  # it had ended, but could not say so; or it just has
        return False
    client.set_terminated(run_id, "KILLED")
    if process is not None:
        said = f"process {process.pid} on {process.host} ended without a word: by kill -9, for want of memory, or so"
        client.set_tag(run_id, "error", said)
    return True
