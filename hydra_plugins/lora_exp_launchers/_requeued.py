"""Jobs that submitit takes back to Slurm's queue, for want of time or for others: they keep a checkpoint, and go on."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from hydra_plugins.lora_exp_launchers._around import Elsewhere
from lora_exp.machine import signals

_MARK = ".requeued"


class Requeued(Elsewhere):
    """A job's task in a process of submitit's, which ends a job by a signal of its own and begins it anew later."""

    def __call__(self, composed: DictConfig) -> Any:
        folder = Path(HydraConfig.get().runtime.output_dir)
        if (folder / _MARK).exists():
            (folder / _MARK).unlink()
            _go_on(composed)
        with ended_first(folder / _MARK):
            return super().__call__(composed)


@contextlib.contextmanager
def ended_first(mark: Path) -> Iterator[None]:
    """Submitit's signal is a wish to stop; what submitit does by it, it does when the job has ended."""
    number = getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")
    theirs = signal.getsignal(number)
    if not callable(theirs):
        yield
        return
    came: list[int] = []

    def note(asked: int, frame: object) -> None:
        came.append(asked)
        signals.ask(signal.SIGTERM, 1)

    signal.signal(number, note)
    try:
        yield
    finally:
        signal.signal(number, theirs)
        if came:
            mark.touch()
            theirs(number, None)  # raises, as the process is to end


def _go_on(composed: DictConfig) -> None:
    if composed.resume is None:
        with read_write(composed), open_dict(composed):
            composed.resume = "auto"
