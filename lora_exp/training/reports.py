"""The native loop's records of a training that somebody else's loop does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_exp.training.loop import Forward, Lane, _Clock, _evaluated, _look, _records, _tokens
from lora_exp.training.watch import Seen, Watch

if TYPE_CHECKING:
    from lora_exp.training.trainer import Keep


class Reports:
    """Told of every micro batch and step, it makes the records, evaluates when it is time to, and stops what diverged.

    In the order of calls: ``start``; for each step ``before_batch`` and ``add`` a micro batch, ``norm`` set to the
    gradients' norm before clipping, ``look`` before the update, ``stepped`` after it. Each may raise to end the
    training. ``more()`` is asked for what else goes into the record of a step.
    """

    def __init__(self, forward: Forward, lane: Lane, keep: Keep) -> None:
        self.forward, self.lane = forward, lane
        self.norm: Tensor = torch.zeros(())
        self.more: Callable[[], dict[str, float]] = dict
        self._keep, self._watch = keep, Watch(lane)
        self._loss, self._units = self._no_loss(), 0

    def start(self) -> None:
        self._keep(_evaluated(self.forward, self.lane))
        self.forward.model.train()
        self._clock = _Clock()

    def before_batch(self, batch: Mapping[str, Tensor]) -> None:
        self.forward.between_batches()
        self._units += _tokens(batch)

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss

    def look(self) -> None:
        """Raise ``DivergedError`` before an update by values that are not finite, where looking costs nothing."""
        if self.lane.state.step == 0:
            self.forward.check_gradients()
        self._clock.count(self._units)
        rate = float(self.lane.schedule.get_last_lr()[0])
        self._seen = Seen(self.lane.state.step + 1, self._loss, self.norm, rate)
        _look(self.forward, self.lane, self._watch, self._seen)

    def stepped(self) -> None:
        self.lane.state.step += 1
        self.lane.state.units += self._units
        self._loss, self._units = self._no_loss(), 0
        for record in _records(self.forward, [self.lane], [self._seen], self._clock):
            self._keep({**record, **self.more()} if "train/loss" in record else record)

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self.forward.device)
