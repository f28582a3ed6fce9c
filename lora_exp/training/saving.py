"""When a lane's state is kept: as its timetable says, at its end, and where a signal ends it."""

from __future__ import annotations

import logging

from lora_exp.machine import signals
from lora_exp.training.lane import Lane
from lora_exp.training.state import TrainingState
from lora_exp.training.trainer import Work
from lora_exp.training.watch import DivergedError, all_finite

log = logging.getLogger(__name__)


class Saver:
    """Of one lane, which it takes up where the work's ``start`` left it."""

    def __init__(self, work: Work, lane: Lane) -> None:
        self._lane, self._checkpoints, self._world = lane, work.checkpoints, work.world
        self._state = TrainingState(work.adapted, lane, work.world)
        if work.start is not None:
            self._state.restore(work.start.state())
        self._saved = lane.state.step

    def between_steps(self) -> None:
        """Save if it is time to, and end here if a signal has come."""
        if self._lane.timetable.saves(self._lane.state.step) or self._lane.is_over:
            self.save()
        self._world.obey()

    def save_if_not_pressed(self) -> None:
        """Save where a first signal has ended the training; with a second one nothing is waited for."""
        if signals.is_pressing():
            return
        self.save()
        if self._checkpoints is not None and self._saved:
            log.info(f"what was learnt up to optimizer step {self._saved} is kept: resume=auto goes on with it")

    def save(self) -> None:
        """Save what has been learnt since the last time. Raises ``DivergedError`` rather than keep a NaN."""
        state = self._lane.state
        if self._checkpoints is None or state.step == self._saved:
            return
        if not all_finite(self._lane.parameters):
            raise DivergedError(
                f"A trained value is no longer finite after optimizer step {state.step}: lower optimizer.lr; the "
                "checkpoints before it are kept"
            )
        taken = self._state.take()  # of all processes, of which one writes
        if self._world.leads:
            self._checkpoints.save(state.step, taken, best=state.best.step, is_last=self._lane.is_over)
        self._saved = state.step
