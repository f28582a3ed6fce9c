"""``task=sync``: tell MLflow what earlier runs could not, each thing once, and end the runs that nobody will."""

from __future__ import annotations

import logging
from pathlib import Path

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.job import SyncResult
from lora_exp.machine import signals
from lora_exp.tracking.client import DEFAULT_FOLDER, checked_client, said_clearly
from lora_exp.tracking.leftovers import tell_rest
from lora_exp.tracking.outbox import outboxes
from lora_exp.tracking.stale import end_stale

log = logging.getLogger(__name__)
_PATIENCE_S = 30.0


class SyncError(UserError):
    """A part is still not delivered."""


def run_sync(config: Config) -> SyncResult:
    """Deliver every journal below ``run`` (a folder; all of ./outputs if it is not given).

    Raises SyncError, with what is left and why, when all that could be delivered is.
    """
    folder = Path(config.run).expanduser() if config.run else DEFAULT_FOLDER
    if not folder.is_dir():
        raise SyncError(f"run={folder} is not a folder: give a run's or a sweep's folder, or leave run out for all")
    left, told, runs = [], 0, 0
    for place, run_id in outboxes(folder):
        signals.obey()
        done = tell_rest(place, run_id, _PATIENCE_S)
        told, runs = told + done.lines, runs + bool(done.lines)
        if done.left:
            left.append(f"{place}: {done.left} entries ({done.trouble or 'MLflow is slow'})")
        elif done.lines:
            log.info(f"{place}: {done.lines} entries delivered")
    if left:
        raise SyncError("\n".join(["MLflow still lacks a part; mend the server and repeat this:", *left]))
    with said_clearly(config.tracking):
        ended = end_stale(checked_client(config.tracking)) if config.tracking.enabled else 0
    log.info(f"{told} entries of {runs} runs delivered" if told else "MLflow lacks nothing of the runs in here")
    return SyncResult(runs, told, ended)
