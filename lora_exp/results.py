"""What a finished training found: summed up, told to tracking and to the person."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from lora_exp.forgetting import forgotten
from lora_exp.job import Job, Result, shown
from lora_exp.machine.memory import peak_gib
from lora_exp.machine.saving import weight_files, weights_sha256
from lora_exp.tracking import mlflow as tracking
from lora_exp.training.loop import Record
from lora_exp.training.trainer import Work

log = logging.getLogger(__name__)


def summed_up(
    tracked: tracking.Run, work: Work, records: list[Record], job: Job, wall_s: float, adapter_sha256: str
) -> Result:
    """The result, from the records and what is on the disk."""
    evaluated = [record for record in records if "eval/loss" in record]
    saved, best = saved_evaluation(work, records), _best(work, records) or evaluated[-1]
    adapted = work.adapted
    return Result(
        eval_loss=float(saved["eval/loss"]),
        eval_loss_before=float(evaluated[0]["eval/loss"]),
        metrics=_beside_loss(saved) | _written(records) | forgotten(records),
        trainable=adapted.trainable,
        total=adapted.total,
        adapter_bytes=sum(file.stat().st_size for file in weight_files(job.folder / "adapter")),
        peak_memory_gib=peak_gib(work.place.device),
        wall_s=wall_s,
        adapter=str(job.folder / "adapter"),
        run_id=tracked.run_id,
        base_weight_bytes=adapted.base_weight_bytes,
        step=int(saved["step"]),
        best_loss=float(best["eval/loss"]),
        best_step=int(best["step"]),
        test={name: value for record in records for name, value in _below("test/", record).items()},
        data_fingerprint=work.data.fingerprint,
        pruned_at=work.best.cut_at,
        adapter_sha256=adapter_sha256,
    )


def say_if_stopped_early(work: Work, records: list[Record]) -> None:
    """Say why there are fewer steps than asked for."""
    best, last = work.best, int(records[-1]["step"])
    if best.is_impatient and last < work.timetable.steps:
        log.info(
            f"stopped after {last} of {work.timetable.steps} steps, as train.early_stopping={best.patience} has it: no "
            f"gain in {best.metric} of more than {best.min_delta:g} since step {best.step}"
        )


def hashes(job: Job, work: Work) -> dict[str, str]:
    """Of what was trained, and of the base's values, by the names that they have everywhere."""
    found = {"adapter_sha256": weights_sha256(job.folder / "adapter")}
    values = work.adapted.base_sha256()
    return found | ({"base_values_sha256": values} if values else {})


def log_result(tracked: tracking.Run, result: Result, records: list[Record], digests: Mapping[str, str]) -> None:
    """Hand tracking what is known at the end: sizes and times, the best evaluation, the adapter's digest."""
    sizes = {name: getattr(result, name) for name in ("adapter_bytes", "peak_memory_gib", "wall_s")}
    best = next(each for each in reversed(records) if "eval/loss" in each and each["step"] == result.best_step)
    figures = {f"best/{name}": value for name, value in _below("eval/", best).items()}
    sizes |= {**figures, "best/step": float(result.best_step or 0)}
    sizes |= {name: value for name, value in forgotten(records).items() if name == "forgotten"}
    tracked.log_metrics(sizes, step=int(records[-1]["step"]))
    pruned = {} if result.pruned_at is None else {"pruned_at": str(result.pruned_at)}
    tracked.log_tags({**digests, **pruned})


def report(result: Result, digests: Mapping[str, str]) -> None:
    """Say it."""
    others = "".join(f"{name} {shown(value)}, " for name, value in result.metrics.items())
    log.info(
        f"validation loss {result.eval_loss_before:.4f} → {result.eval_loss:.4f}, {others}"
        f"{result.wall_s:.0f} s, peak memory {result.peak_memory_gib:.2f} GiB"
    )
    if result.best_step != result.step:
        best = f"best was validation loss {result.best_loss:.4f} at step {result.best_step}"
        log.info(f"{best}; train.keep=best keeps that adapter")
    if result.test:
        log.info("test " + ", ".join(f"{name} {shown(value)}" for name, value in result.test.items()))
    log.info(f"adapter {result.adapter} (step {result.step}, {result.adapter_bytes / 1e6:.1f} MB)")
    log.info("hashes " + ", ".join(f"{name} {digest[:12]}" for name, digest in sorted(digests.items())))


def saved_evaluation(work: Work, records: list[Record]) -> Record:
    """The evaluation whose adapter is in the job's folder."""
    evaluated = [record for record in records if "eval/loss" in record]
    best = _best(work, evaluated)
    return best if best is not None and work.train.keeps_best else evaluated[-1]


def _best(work: Work, records: list[Record]) -> Record | None:
    return next((each for each in records if work.best.metric in each and each["step"] == work.best.step), None)


def _beside_loss(record: Record) -> dict[str, float]:
    return {name: value for name, value in _below("eval/", record).items() if name != "loss"}


def _written(records: list[Record]) -> dict[str, float]:
    """What the model wrote before and at the end."""
    found = [each for record in records if (each := _below("written/", record))]
    before = {f"{name}_before": value for name, value in found[0].items()} if found else {}
    return before | (found[-1] if found else {})


def _below(prefix: str, record: Record) -> dict[str, float]:
    return {name.removeprefix(prefix): float(record[name]) for name in record if name.startswith(prefix)}
