"""The native loop's records of a training that somebody else's loop does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lora_exp.config import TrainConfig
from lora_exp.training.loop import Forward, Lane, _answers_at_once, _Clock, _evaluated, _tokens, _trained, _Watch

if TYPE_CHECKING:
    from lora_exp.training.trainer import Keep


class Reports:
    """Told of every micro batch and step, it makes the records, evaluates when it is time to, and stops what diverged.

    In the order of calls: ``start``; for each step ``before_batch`` and ``add`` a micro batch, ``norm`` set to the
    gradients' norm before clipping, ``look`` before the update, ``stepped`` after it. Each may raise to end the
    training. ``more()`` is asked for what else goes into the record of a step.
    """

    def __init__(self, forward: Forward, lane: Lane, section: TrainConfig, keep: Keep) -> None:
        self.forward, self.lane = forward, lane
        self.norm: Tensor = torch.zeros(())
        self.step = 0
        self._section, self._keep = section, keep
        self._watch = _Watch(lane)
        self._loss = self._no_loss()
        self._rate = 0.0
        self.more: Callable[[], dict[str, float]] = dict

    def start(self) -> None:
        self._keep(_evaluated(self.forward, self.lane, 0))
        self.forward.model.train()
        self._clock = _Clock()

    def before_batch(self, batch: dict[str, Any]) -> None:
        self.forward.between_batches()
        self._clock.count(_tokens(batch))

    def add(self, loss: Tensor) -> None:
        self._loss = self._loss + loss

    def look(self) -> None:
        """Raise ``DivergedError`` before an update by values that are not finite, where looking costs nothing."""
        if self.step == 0:
            self.forward.check_gradients()
        self._rate = float(self.lane.schedule.get_last_lr()[0])
        step = self.step + 1
        self._watch.note(step, self._loss, self.norm)
        if self._is_logged(step) or self._is_evaluated(step) or _answers_at_once(self.forward.device):
            self._watch.check()

    def stepped(self) -> None:
        self.step += 1
        loss, self._loss = self._loss, self._no_loss()
        if self._is_logged(self.step):
            record = _trained(self.lane, self.step, loss, self.norm, self._rate)
            self._keep({**record, **self.more(), f"train/{self.forward.unit}_per_s": self._clock.lap()})
        if self._is_evaluated(self.step):
            self._clock.pause()
            self._keep(_evaluated(self.forward, self.lane, self.step))
            self.forward.model.train()
            self._clock.resume()

    def _is_logged(self, step: int) -> bool:
        return step % self._section.log_every == 0 or step == self._section.steps

    def _is_evaluated(self, step: int) -> bool:
        return step % self._section.eval_every == 0 or step == self._section.steps

    def _no_loss(self) -> Tensor:
        return torch.zeros((), device=self.forward.device)
