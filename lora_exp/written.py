"""What a model writes for held-out rows, before it is trained and after: metrics that no loss tells."""

from __future__ import annotations

import logging

from lora_exp.job import Job, shown
from lora_exp.keeping import take_back_kept
from lora_exp.machine import signals
from lora_exp.recording import Recorder
from lora_exp.results import saved_evaluation
from lora_exp.training.trainer import Work
from lora_exp.training.trainers.native import LANE

log = logging.getLogger(__name__)
PREFIX = "written/"


def look_at_written(work: Work, recorder: Recorder, job: Job | None = None) -> None:
    """Have the model write, and keep what comes of it: before training, or given ``job`` as the model is saved there.

    A run that goes on has what the untrained model wrote among its records already.
    """
    if work.data.written is None or (job is None and work.start is not None):
        return
    step = 0
    if job is not None:
        take_back_kept(work, job.folder)
        step = int(saved_evaluation(work, recorder.records)["step"]) if work.world.leads else 0
    with work.place.compute():
        figures = work.data.written(work.adapted.model, work.place.device, signals.obey)
    log.info(f"step {step:>4}  written  " + "  ".join(f"{name} {shown(value)}" for name, value in figures.items()))
    recorder.keep({"lane": LANE, "step": step} | {f"{PREFIX}{name}": value for name, value in figures.items()})
