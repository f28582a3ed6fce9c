"""The loss on data that a model is not trained on, before it is trained and after."""

from __future__ import annotations

import contextlib
import logging
from dataclasses import replace

from lora_exp.forgetting import PREFIX, Other
from lora_exp.job import Job
from lora_exp.keeping import take_back_kept
from lora_exp.recording import Recorder
from lora_exp.results import saved_evaluation
from lora_exp.training.loop import evaluate
from lora_exp.training.metrics import chosen
from lora_exp.training.trainer import Work
from lora_exp.training.trainers.native import LANE, forward_of

log = logging.getLogger(__name__)


def look_at_forgotten(other: Other | None, work: Work, recorder: Recorder, job: Job | None = None) -> None:
    """Take the loss on ``other``: of the base before training, or given ``job`` of the model as it is saved there.

    A run that goes on has the base's among its records already.
    """
    if other is None or (job is None and work.start is not None):
        return
    step = 0
    if job is not None:
        take_back_kept(work, job.folder)
        step = int(saved_evaluation(work, recorder.records)["step"]) if work.world.leads else 0
    kind = other.kind
    forward = replace(
        forward_of(work), losses=kind.losses, count=kind.count, metrics=chosen(), unit=kind.unit, join=kind.join
    )
    batches = other.batches(work.train.micro_batch_size, work.train.eval_blocks)
    with work.adapted.without() if job is None else contextlib.nullcontext():
        loss = evaluate(forward, batches, LANE)["loss"]
    log.info(f"step {step:>4}  forget  loss {loss:.4f} on {other.label}")
    recorder.keep({"lane": LANE, "step": step, f"{PREFIX}loss": loss})
