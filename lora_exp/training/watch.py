"""Looks after a lane's losses and gradient norms: one that is no longer finite ends the training with its step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lora_exp.errors import UserError
from lora_exp.training.lane import Lane

MOST_UNSEEN = 100  # steps; where nothing is logged, too, a NaN is found
_MOST_SKIPPED = 30  # in a row: the scale has then been halved from 65,536 to below a ten-thousandth


class DivergedError(UserError):
    """A loss that is no longer finite."""


class Seen(NamedTuple):
    """What one optimizer step found: ``loss`` and ``norm`` stay on the device, ``rate`` is the learning rate."""

    step: int
    loss: Tensor
    norm: Tensor
    rate: float


class Watch:
    """A lane's losses and gradient norms since the last ``check``, left on the device until then."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._unseen: list[Seen] = []
        self._skipped = 0

    def note(self, seen: Seen) -> None:
        self._unseen.append(seen)

    @property
    def is_full(self) -> bool:
        """Whether it is time for a look, though nobody asks for the values."""
        return len(self._unseen) >= MOST_UNSEEN

    def check(self) -> None:
        """Raise DivergedError for the first value that is not finite."""
        if not self._unseen:
            return
        values = torch.stack([value.float() for seen in self._unseen for value in (seen.loss, seen.norm)]).tolist()
        for seen, loss, norm in zip(self._unseen, values[::2], values[1::2], strict=True):
            if not math.isfinite(loss):
                raise self._diverged("loss", loss, seen)
            if not math.isfinite(norm) and not self._is_skipped(norm):
                raise self._diverged("grad_norm", norm, seen)
        self._unseen = []

    def _is_skipped(self, norm: float) -> bool:
        """A scaled gradient may overflow: that step is left out, and the scale halved, until it fits."""
        self._skipped = 0 if math.isfinite(norm) else self._skipped + 1
        return self._lane.scaler is not None and self._skipped < _MOST_SKIPPED

    def _diverged(self, name: str, value: float, seen: Seen) -> DivergedError:
        return DivergedError(
            f"train/{name} became {value} at optimizer step {seen.step} (lane {self._lane.name}), with a learning rate "
            f"of {seen.rate:.3g}: lower optimizer.lr (it is {self._lane.optimizer.defaults['lr']:g}) or "
            "train.max_grad_norm, warm up longer, or use model.dtype=float32"
        )


def all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether no value is a NaN or infinite. One copy from the device."""
    return bool(torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all().item())
