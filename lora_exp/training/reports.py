"""The native loop's records of a training that somebody else's loop does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_exp.training.clock import Clock
from lora_exp.training.loop import Forward, Lane, evaluations, look, trained
from lora_exp.training.watch import Seen, Watch

if TYPE_CHECKING:
    from lora_exp.training.trainer import Keep


class Reports:
    """Told of every micro batch and step, it makes the records, evaluates when it is time to, and stops what diverged.

    In the order of calls: ``start``; for each step ``before_step``, then ``before_batch`` and ``add`` a micro batch,
    ``norm`` set to the gradients' norm before clipping, ``look`` before the update, ``stepped`` after it. Each may
    raise to end the training. ``more()`` is asked for what else goes into the record of a step.
    """

    def __init__(self, forward: Forward, lane: Lane, keep: Keep) -> None:
        self.forward, self.lane = forward, lane
        self.norm: Tensor = torch.zeros(())
        self.more: Callable[[], dict[str, float]] = dict
        self._keep, self._watch = keep, Watch(lane)
        self._loss, self._units = self._no_loss(), 0

    def start(self) -> None:
        self._evaluate()
        self._clock = Clock()

    def before_step(self) -> None:
        self.forward.between_steps()

    def before_batch(self, batch: Mapping[str, Tensor]) -> None:
        self.forward.between_batches()
        self._units += batch["labels"].numel()

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss

    def look(self) -> None:
        """Raise ``DivergedError`` before an update by values that are not finite, where looking costs nothing."""
        step = self.lane.state.step
        if step == 0:
            self.forward.check_gradients()
        self._clock.count(self._units)
        self._seen = Seen(step + 1, self._loss, self.norm, float(self.lane.schedule.get_last_lr()[0]))
        look(self.forward, self.lane, self._watch, self._seen)

    def stepped(self) -> None:
        state = self.lane.state
        state.step, state.is_evaluated, state.units = state.step + 1, False, state.units + self._units
        self._loss, self._units = self._no_loss(), 0
        for record in trained(self.forward, [self.lane], [self._seen], self._clock):
            self._keep({**record, **self.more()})
        if self.lane.is_evaluation_due:
            self._clock.pause()
            self._evaluate()
            self._clock.resume()

    def _evaluate(self) -> None:
        for record in evaluations(self.forward, [self.lane]):
            self._keep(record)
        self.forward.model.train()

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self.forward.device)
