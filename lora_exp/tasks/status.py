"""``task=status``: how far a sweep is, from any terminal that sees its folder."""

from __future__ import annotations

import logging
import time
from pathlib import Path

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task

log = logging.getLogger(__name__)
SWEEPS = Path("outputs/sweeps")
_LOOK_EVERY_S = 1.0


@task("status")
class Status(Task):
    result = UseResult
    of_folder = True

    def problems(self, config: Config) -> list[str]:
        if config.run is None or isinstance(config.run, str):
            return []
        return [f"run={config.run} is of task=status one folder: a sweep's"]

    def run(self, config: Config, job: Job) -> UseResult:
        from lora_exp.sweep.live import follow, lines

        folder = _folder(config.run)
        log.info(f"sweep  {folder}")
        state = follow(folder, _look_again)
        for line in lines(state):
            log.info(line)
        if signals.received() is not None:
            signals.answered()  # it was the looking that was to end
        return UseResult({"ended": float(len(state.ended)), "jobs": float(state.total)})


def _look_again() -> bool:
    time.sleep(_LOOK_EVERY_S)
    return signals.received() is None


def _folder(run: str | None) -> Path:
    """The sweep's that ``run`` names; of None the one begun last here. Raises UserError where there is none."""
    from lora_exp.sweep.state import begun_last, is_sweep

    if run is None:
        if found := begun_last(SWEEPS):
            return found
        raise UserError(f"There is no sweep in {SWEEPS.resolve()}: name its folder with run=FOLDER")
    folder = Path(run)
    if not is_sweep(folder):
        raise UserError(f"run={run} is not the folder of a sweep: run=outputs/sweeps/DATE/TIME, say")
    return folder
