"""When a training does what: its length, its warm-up, and after which optimizer steps it logs, evaluates and saves.

Imports nothing heavy: the checks parse a config's intervals with it before anything is loaded.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from lora_exp.config import DEFAULT_STEPS, DEFAULT_WARMUP_STEPS, TrainConfig
from lora_exp.errors import UserError

_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)?\s*(steps?|epochs?)?\s*")


@dataclass(frozen=True)
class Interval:
    """Every ``count`` optimizer steps, or epochs."""

    count: Fraction
    in_epochs: bool

    def in_steps(self, epoch_steps: int | None) -> Fraction:
        """The same in optimizer steps, which need not be a whole number of them. Raises UserError without epochs."""
        if not self.in_epochs:
            return self.count
        if epoch_steps is None:
            raise UserError("the data is streamed, so that the length of an epoch is not known: count in steps")
        return self.count * epoch_steps


def parse_interval(key: str, value: object) -> Interval | None:
    """``12`` is optimizer steps, ``"0.5 epoch"`` epochs; None (never) for 0 and null. Raises UserError for the rest."""
    found = _WRITTEN.fullmatch("0" if value is None else str(value))
    if found is None or isinstance(value, bool) or not (found[1] or found[2]):
        raise UserError(_no_interval(key, value))
    count, in_epochs = Fraction(found[1] or 1), (found[2] or "").startswith("epoch")
    if not in_epochs and count.denominator != 1:
        raise UserError(_no_interval(key, value))
    return Interval(count, in_epochs) if count else None


def _no_interval(key: str, value: object) -> str:
    return f"{key}={value} is no interval: use a number of optimizer steps such as 12, epochs such as '0.5 epoch', or 0"


@dataclass(frozen=True)
class Timetable:
    """One lane's. An optimizer step never reaches into the next epoch, so that an epoch's last may be a smaller one.

    ``epoch_micro_batches``: an epoch in this process; None where nobody knows, as with streamed data. ``eval_every``,
    ``log_every`` and ``save_every`` are in optimizer steps, of which half an epoch need not be a whole number; None:
    never in between.
    """

    steps: int
    grad_accum_steps: int = 1
    warmup_steps: int = 0
    epoch_micro_batches: int | None = None
    eval_every: Fraction | None = None
    log_every: Fraction | None = None
    save_every: Fraction | None = None

    @classmethod
    def of(cls, section: TrainConfig, epoch_micro_batches: int | None) -> Timetable:
        """Raises UserError where the section asks for epochs that cannot be told, or for more warm-up than steps."""
        accumulate = section.grad_accum_steps
        epoch_steps = None if epoch_micro_batches is None else max(1, math.ceil(epoch_micro_batches / accumulate))
        steps = _steps(section, epoch_steps)
        return cls(
            steps,
            accumulate,
            _warmup_steps(section, steps),
            epoch_micro_batches,
            *(_every(section, name, epoch_steps) for name in ("eval_every", "log_every", "save_every")),
        )

    @property
    def epoch_steps(self) -> int | None:
        """Optimizer steps an epoch, the smaller last one too."""
        known = self.epoch_micro_batches
        return None if known is None else max(1, math.ceil(known / self.grad_accum_steps))

    def micro_batches(self, step: int) -> int:
        """How many micro batches the optimizer step of this number (from 1) takes."""
        per_epoch = self.epoch_steps
        if not self.epoch_micro_batches or per_epoch is None or step % per_epoch:
            return self.grad_accum_steps
        return self.epoch_micro_batches - (per_epoch - 1) * self.grad_accum_steps

    def in_words(self, micro_batch_size: int) -> str:
        """For a person, before it begins."""
        known = "" if self.epoch_steps is None else f" ({float(f'{self.steps / self.epoch_steps:.3g}'):g} epochs)"
        taken = f"{self.grad_accum_steps} × {micro_batch_size} rows"
        return f"{self.steps:,} optimizer steps of {taken}{known}, {self.warmup_steps:,} of them to warm up"

    def epochs(self, step: int) -> float | None:
        """How many epochs have been trained after this step; None where nobody knows."""
        return None if self.epoch_steps is None else step / self.epoch_steps

    def evaluates(self, step: int) -> bool:
        """Whether there is an evaluation after this step; after the last there always is."""
        return step == self.steps or _is_due(self.eval_every, step)

    def logs(self, step: int) -> bool:
        """Whether what this step found is logged; of the last it always is."""
        return step == self.steps or _is_due(self.log_every, step)

    def saves(self, step: int) -> bool:
        """Whether a checkpoint is written after this step."""
        return _is_due(self.save_every, step)


def micro_batches_of(rows: int, size: int, drop_last: bool) -> int:
    """Micro batches that ``rows`` make in an epoch: the last may be smaller, or is dropped if it is."""
    return rows // size if drop_last else math.ceil(rows / size)


def _steps(section: TrainConfig, epoch_steps: int | None) -> int:
    if section.epochs is None:
        return DEFAULT_STEPS if section.steps is None else section.steps
    if section.steps is not None:
        raise UserError(two_lengths(section))
    if epoch_steps is None:
        raise UserError(
            f"train.epochs={section.epochs:g}: the data is streamed, so that the length of an epoch is not known: "
            "give train.steps instead"
        )
    return math.ceil(Fraction(str(section.epochs)) * epoch_steps)


def two_lengths(section: TrainConfig) -> str:
    """That ``steps`` and ``epochs`` are both given."""
    return (
        f"train.steps={section.steps} and train.epochs={section.epochs:g} are two lengths of one training: "
        f"take one out (train.steps=null or train.epochs=null)"
    )


def _warmup_steps(section: TrainConfig, steps: int) -> int:
    if section.warmup_ratio is not None:
        return math.ceil(Fraction(str(section.warmup_ratio)) * steps)
    if section.warmup_steps is None:
        return min(DEFAULT_WARMUP_STEPS, steps)
    if section.warmup_steps > steps:
        raise UserError(
            f"train.warmup_steps={section.warmup_steps} is outside [0, {steps}], the optimizer steps of this training: "
            "lower it, or give train.warmup_ratio such as 0.03"
        )
    return section.warmup_steps


def _every(section: TrainConfig, name: str, epoch_steps: int | None) -> Fraction | None:
    interval = parse_interval(f"train.{name}", getattr(section, name))
    try:
        return None if interval is None else interval.in_steps(epoch_steps)
    except UserError as error:
        raise UserError(f"train.{name}={getattr(section, name)}: {error}") from None


def _is_due(every: Fraction | None, step: int) -> bool:
    """Whether a multiple of ``every`` lies in (step - 1, step]."""
    return every is not None and step // every > (step - 1) // every
