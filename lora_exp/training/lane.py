"""A lane: what is trained together, by its own timetable, and how far it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_exp.training.best import Best
from lora_exp.training.timetable import Timetable

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.optim.lr_scheduler import LRScheduler

    from lora_exp.training.objectives import Batch


@dataclass
class LaneState:
    """How far a lane is: what the loop keeps of it beside its tensors, its generators and its batches' position.

    Whenever the loop yields or calls ``between_steps``, it is true of the lane's parameters and the records so far.

    ``is_evaluated``: whether the evaluation due after ``step``, if any, is done and recorded. ``units``: how many
    tokens (images, rows) the lane has been trained on. To go on from another step than the first, restore it before
    the loop starts; the batches must then be those that follow.
    """

    step: int = 0
    is_evaluated: bool = False
    units: int = 0
    best: Best = field(default_factory=Best)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        plain = {"step": self.step, "is_evaluated": self.is_evaluated, "units": self.units}
        return {**plain, "best": self.best.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what ``to_json`` gave."""
        self.step, self.is_evaluated = int(state["step"]), bool(state["is_evaluated"])
        self.units = int(state["units"])
        self.best.restore(state["best"])


@dataclass
class Lane:
    """One set of parameters in training. Records carry its ``name``.

    ``scaler``: keeps gradients of float16 products above its smallest number; its state belongs to a checkpoint.
    """

    name: str
    parameters: list[nn.Parameter]
    batches: Iterator[Batch]
    evaluation: list[Batch]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler
    timetable: Timetable
    max_grad_norm: float = 1.0
    scaler: torch.amp.GradScaler | None = None
    state: LaneState = field(default_factory=LaneState)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to train: all steps are done, or more of them would not pay."""
        return self.state.step >= self.timetable.steps or self.state.best.should_stop

    @property
    def is_evaluation_due(self) -> bool:
        """Whether what it has come to is to be evaluated: before the first step, and as its timetable says."""
        step = self.state.step
        return not self.state.is_evaluated and (step == 0 or self.timetable.evaluates(step))
