"""Learning-rate schedules: transformers', under its names."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lora_exp.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch.optim.lr_scheduler import LambdaLR

    from lora_exp.config import TrainConfig
    from lora_exp.training.timetable import Timetable

# Each with the options that it takes, transformers' arguments: the checks cannot wait for its import, a test compares.
# Those that look at the loss (reduce_lr_on_plateau, greedy) have no place in a loop whose rates are known beforehand.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "cosine": ("num_cycles",),
    "linear": (),
    "constant": (),
    "constant_with_warmup": (),
    "cosine_with_restarts": ("num_cycles",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "polynomial": ("lr_end", "power"),
    "inverse_sqrt": ("timescale",),
    "warmup_stable_decay": (
        "num_decay_steps",
        "num_stable_steps",
        "warmup_type",
        "decay_type",
        "min_lr_ratio",
        "num_cycles",
    ),
}
_NEEDED = {  # one of them, with an example
    "cosine_with_min_lr": ({"min_lr", "min_lr_rate"}, "{min_lr_rate: 0.1}"),
    "cosine_warmup_with_min_lr": ({"min_lr", "min_lr_rate"}, "{min_lr_rate: 0.1}"),
    "warmup_stable_decay": ({"num_decay_steps"}, "{num_decay_steps: 4}"),
}


def schedule_problems(name: str, options: object) -> list[str]:
    """What is wrong with ``train.schedule`` and ``train.schedule_options``."""
    options = {} if options is None else options
    if not isinstance(options, dict):
        return [f"train.schedule_options={options} is not a mapping: such as '{{min_lr_rate: 0.1}}', or null"]
    if name not in SCHEDULES:
        return [f"train.schedule={name} is not known: choose one of {', '.join(SCHEDULES)}"]
    known = SCHEDULES[name]
    takes = f"it takes {', '.join(known)}" if known else "it takes none"
    problems = [
        f"train.schedule_options: {key} is no option of train.schedule={name}; {takes}"
        for key in options
        if key not in known
    ]
    needed, example = _NEEDED.get(name, (set(), ""))
    if needed and not needed & options.keys():
        problems.append(
            f"train.schedule={name} needs {' or '.join(sorted(needed))}: such as train.schedule_options='{example}'"
        )
    return problems


def build_schedule(optimizer: torch.optim.Optimizer, section: TrainConfig, timetable: Timetable) -> LambdaLR:
    """The schedule of this name over the timetable's steps.

    ``constant`` warms up, too, if there is a warm-up (transformers' would pass over it): with
    ``train.warmup_steps=0`` it does not. Raises UserError for options with values that the schedule cannot use.
    """
    if section.schedule in _PLAIN and not section.schedule_options:
        return _plain(optimizer, _PLAIN[section.schedule], timetable)
    from transformers.optimization import get_scheduler  # imports PEFT, two seconds that the plain ones do without

    options = {key: value for key, value in (section.schedule_options or {}).items() if value is not None}
    try:
        _check_decay(options, timetable)
        made: LambdaLR = get_scheduler(
            section.schedule, optimizer, timetable.warmup_steps, timetable.steps, options or None
        )
        for step in (timetable.warmup_steps, timetable.steps):  # some fail there alone
            float(made.lr_lambdas[0](step))
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(
            f"train.schedule={section.schedule} train.schedule_options={section.schedule_options} with "
            f"{timetable.warmup_steps} of {timetable.steps} steps to warm up: {error}; change the options or the "
            "warm-up, or use train.schedule=cosine"
        ) from error
    return made


def _check_decay(options: dict[str, Any], timetable: Timetable) -> None:
    """Raise ValueError where ``warmup_stable_decay`` has more steps to decay in than there are: it would jump there."""
    left, decay = timetable.steps - timetable.warmup_steps, options.get("num_decay_steps", 0)
    if decay > left:
        raise ValueError(f"num_decay_steps={decay} is more than the {left} steps that are left")


def _cosine(progress: float) -> float:
    return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))


def _linear(progress: float) -> float:
    return max(0.0, 1 - progress)


def _constant(progress: float) -> float:
    return 1.0


_PLAIN = {"cosine": _cosine, "linear": _linear, "constant": _constant, "constant_with_warmup": _constant}


def _plain(optimizer: torch.optim.Optimizer, decay: Callable[[float], float], timetable: Timetable) -> LambdaLR:
    """A linear warm-up, then ``decay`` of the share that is done of what is left."""
    from torch.optim.lr_scheduler import LambdaLR

    warmup, steps = timetable.warmup_steps, timetable.steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return decay((step - warmup) / max(1, steps - warmup))

    return LambdaLR(optimizer, factor)
