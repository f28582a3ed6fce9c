"""The harness's own loop."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from lora_exp.training.trainer import Trainer, Work, trainer

if TYPE_CHECKING:
    from lora_exp.training.loop import Forward, Lane
    from lora_exp.training.trainer import Keep

LANE = "default"


@trainer("native")
class Native(Trainer):
    resumes = True
    is_parallel = True

    def train(self, work: Work, keep: Keep) -> None:
        from lora_exp.machine import signals
        from lora_exp.training.loop import train
        from lora_exp.training.saving import Saver

        lane = lane_of(work)
        saver = Saver(work, lane)
        forward = replace(forward_of(work), between_steps=saver.between_steps)
        forward = forward if work.passes is None else replace(forward, passes=work.passes)
        try:
            for record in train(forward, [lane]):
                keep(record)
        except signals.Stopped:
            saver.save_if_not_pressed()
            raise


def lane_of(work: Work) -> Lane:
    """The one lane of a job."""
    from lora_exp.training.batches import evaluation_batches, training_batches
    from lora_exp.training.lane import Lane, LaneState
    from lora_exp.training.optimizers import build_optimizer, gradient_scaler, undecayed
    from lora_exp.training.schedules import build_schedule

    section, pin, collate = work.train, work.place.device.type == "cuda", work.kind.collate
    adapted, plain = work.adapted, undecayed(work.adapted.model)
    optimizer = build_optimizer(adapted.parameters, work.optimizer, adapted.fast, plain)
    size, world = section.micro_batch_size, work.world
    return Lane(
        name=LANE,
        parameters=adapted.parameters,
        batches=training_batches(
            work.data.train, size, work.seed, pin, collate, section.drop_last, world.rank, world.size
        ),
        evaluation=evaluation_batches(
            work.data.validation, work.evaluation_rows or size, section.eval_blocks, pin, collate
        ),
        optimizer=optimizer,
        schedule=build_schedule(optimizer, section, work.timetable),
        timetable=work.timetable,
        max_grad_norm=section.max_grad_norm,
        scaler=gradient_scaler(work.place),
        state=LaneState(best=work.best),
    )


def forward_of(work: Work) -> Forward:
    """How the job's batches become losses."""
    from lora_exp.machine import signals
    from lora_exp.training.loop import Forward
    from lora_exp.training.metrics import chosen

    kind = work.kind
    return Forward(
        model=work.adapted.model,
        losses=kind.losses,
        count=kind.count,
        device=work.place.device,
        compute=work.place.compute,
        check_gradients=work.adapted.check_gradients,
        metrics=chosen(*kind.metrics, *work.train.metrics),
        unit=kind.unit,
        between_batches=signals.obey,
        between_steps=work.world.obey,
        world=work.world,
        join=kind.join,
        at_start=work.at_start,
    )
