"""What can be seen to be wrong with the section ``train`` before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable

from lora_exp.config import TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.metrics import higher_is_better, metrics
from lora_exp.training.schedules import schedule_problems
from lora_exp.training.timetable import parse_interval, two_lengths


def train_problems(train: TrainConfig, of_kind: Iterable[str]) -> list[str]:
    """Every problem; ``of_kind`` are the metrics that the kind of data has of its own."""
    problems = [*_length_problems(train), *_warmup_problems(train), *_interval_problems(train)]
    if not train.max_grad_norm > 0:
        problems.append(f"train.max_grad_norm={train.max_grad_norm} must be above 0: use inf to switch clipping off")
    problems += schedule_problems(train.schedule, train.schedule_options)
    problems += [problem for name in train.metrics if (problem := metrics.problem(name))]
    return problems + _best_problems(train, ("loss", *of_kind, *train.metrics))


def _length_problems(train: TrainConfig) -> list[str]:
    at_least_one = {
        "train.steps": train.steps,
        "train.micro_batch_size": train.micro_batch_size,
        "train.grad_accum_steps": train.grad_accum_steps,
        "train.eval_blocks": train.eval_blocks,
    }
    problems = [f"{key}={value} is below 1" for key, value in at_least_one.items() if value is not None and value < 1]
    if train.keep_checkpoints < 0:
        problems.append(f"train.keep_checkpoints={train.keep_checkpoints} is below 0: 0 writes none")
    if train.epochs is not None and not (train.epochs > 0 and math.isfinite(train.epochs)):
        problems.append(f"train.epochs={train.epochs:g} must be a finite number above 0, such as 3 or 0.5")
    if train.steps is not None and train.epochs is not None:
        problems.append(two_lengths(train))
    return problems


def _warmup_problems(train: TrainConfig) -> list[str]:
    steps, ratio = train.warmup_steps, train.warmup_ratio
    problems = []
    if steps is not None and ratio is not None:
        problems.append(
            f"train.warmup_steps={steps} and train.warmup_ratio={ratio:g} are two warm-ups: "
            "take one out (train.warmup_steps=null or train.warmup_ratio=null)"
        )
    if ratio is not None and not 0 <= ratio <= 1:
        problems.append(f"train.warmup_ratio={ratio:g} is outside [0, 1], a share of all steps: such as 0.03")
    if steps is not None and not 0 <= steps <= (math.inf if train.steps is None else train.steps):
        longest = "" if train.steps is None else f"train.steps={train.steps}"
        problems.append(f"train.warmup_steps={steps} is outside [0, {longest or 'all steps'}]")
    return problems


def _interval_problems(train: TrainConfig) -> list[str]:
    problems = []
    for name in ("eval_every", "log_every", "save_every"):
        try:
            parse_interval(f"train.{name}", getattr(train, name))
        except UserError as error:
            problems.append(str(error))
    return problems


def _best_problems(train: TrainConfig, known: tuple[str, ...]) -> list[str]:
    problems = []
    if train.keep not in (None, "last", "best"):
        problems.append(f"train.keep={train.keep} is not known: choose one of last, best (or leave it out)")
    if train.keep == "last" and train.early_stopping is not None:
        problems.append(
            f"train.keep=last with train.early_stopping={train.early_stopping} would keep what training ended for: "
            "leave train.keep out, or use train.keep=best"
        )
    if train.early_stopping is not None and train.early_stopping < 1:
        problems.append(f"train.early_stopping={train.early_stopping} is below 1: such as 3 evaluations, or null")
    if train.early_stopping is not None and not _evaluates(train):
        problems.append(
            f"train.early_stopping={train.early_stopping} counts evaluations, of which train.eval_every="
            f"{train.eval_every} leaves none: such as train.eval_every=12"
        )
    if not train.min_delta >= 0:
        problems.append(f"train.min_delta={train.min_delta:g} is below 0: the least gain that counts")
    return problems + _metric_problems(train.best_metric, known)


def _evaluates(train: TrainConfig) -> bool:
    try:
        return parse_interval("train.eval_every", train.eval_every) is not None
    except UserError:  # said already
        return True


def _metric_problems(best_metric: str, known: tuple[str, ...]) -> list[str]:
    named = [f"eval/{name}" for name in dict.fromkeys(known)]
    if best_metric not in named:
        return [
            f"train.best_metric={best_metric} is not evaluated: choose one of {', '.join(named)}, or add it to "
            "train.metrics"
        ]
    try:
        higher_is_better(best_metric)
    except UserError as error:
        return [str(error)] if not metrics.problem(best_metric.removeprefix("eval/")) else []
    return []
