"""What a lane's training must have to go on as if it had never been interrupted, to the bit."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy
import torch
from torch import Tensor

from lora_exp.errors import UserError
from lora_exp.machine.distributed import ALONE, World
from lora_exp.training.batches import TrainingBatches
from lora_exp.training.nested import packed, unpacked

if TYPE_CHECKING:
    from lora_exp.backends import Adapted
    from lora_exp.training.lane import Lane

log = logging.getLogger(__name__)
State = Mapping[str, Any]


class TrainingState:
    """Takes and restores the state of ``lane``. To be made before the first step."""

    def __init__(self, adapted: Adapted, lane: Lane, world: World = ALONE) -> None:
        self._world = world
        assert isinstance(lane.batches, TrainingBatches)
        self._adapted, self._lane, self._batches = adapted, lane, lane.batches
        self._at_start = {name: _digest(value) for name, value in adapted.model.named_buffers()}

    def take(self) -> State:
        """Valid until the next step: tensors are not copied. ``buffers``: the base's that are not as at the start."""
        buffers = dict(self._adapted.model.named_buffers())
        digests = {name: _digest(value) for name, value in buffers.items()}
        return {
            "parameters": self._parameters(),
            "buffers": {name: buffers[name] for name in buffers if digests[name] != self._at_start.get(name)},
            "buffers_at_start": self._at_start,
            "optimizer": self._lane.optimizer.state_dict(),
            "schedule": self._lane.schedule.state_dict(),
            "scaler": None if self._lane.scaler is None else self._lane.scaler.state_dict(),
            "lane": self._lane.state.to_json(),
            "processes": [unpacked(each) for each in self._world.collected(packed(self._own()))],
        }

    def _own(self) -> State:
        """What differs between processes that train together."""
        masks, batches = dict(self._adapted.masks()), self._batches.state_dict()
        return {"masks": masks, "batches": batches, "generators": generators()}

    def restore(self, state: State) -> None:
        """Raises UserError if the state is another model's."""
        self._compare_buffers(state["buffers_at_start"])
        _copy(state["parameters"], self._parameters(), "parameter")
        _copy(state["buffers"], dict(self._adapted.model.named_buffers()), "buffer", is_whole=False)
        self._lane.optimizer.load_state_dict(dict(state["optimizer"]))
        self._lane.schedule.load_state_dict(dict(state["schedule"]))
        if self._lane.scaler is not None:
            self._lane.scaler.load_state_dict(dict(state["scaler"]))
        own = state["processes"][self._world.rank]
        self._adapted.load_masks(own["masks"])
        self._batches.load_state_dict(own["batches"])
        self._lane.state.restore(state["lane"])
        load_generators(own["generators"])  # last: what is above may draw

    def _parameters(self) -> dict[str, Tensor]:
        """What is trained, and what was drawn beside it."""
        names: dict[int, str] = {id(value): name for name, value in self._adapted.model.named_parameters()}
        trained = {names.get(id(value), str(i)): value for i, value in enumerate(self._adapted.parameters)}
        return {**self._adapted.added, **trained}

    def _compare_buffers(self, at_start: Mapping[str, str]) -> None:
        names = sorted((at_start.keys() & self._at_start.keys()) - self._adapted.added.keys())
        if differing := [name for name in names if at_start[name] != self._at_start[name]]:
            log.warning(
                f"{_some(differing)}: computed otherwise here than where the run began, its bits may differ, too"
            )


def generators() -> dict[str, Any]:
    """The state of every global random generator."""
    found: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    name, keys, place, has_gauss, gauss = numpy.random.get_state(legacy=True)
    found["numpy"] = (str(name), numpy.asarray(keys).tolist(), int(place), int(has_gauss), float(gauss))
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        found["mps"] = torch.mps.get_rng_state()
    return found


def load_generators(found: Mapping[str, Any]) -> None:
    """Set them; those of devices that are not here are left out."""
    torch.set_rng_state(found["torch"])
    random.setstate(found["python"])
    numpy.random.set_state(found["numpy"])
    if "cuda" in found and torch.cuda.is_available():
        for device, state in list(enumerate(found["cuda"]))[: torch.cuda.device_count()]:
            torch.cuda.set_rng_state(state, device)
    if "mps" in found and torch.backends.mps.is_available():
        torch.mps.set_rng_state(found["mps"])


@torch.no_grad()
def _copy(given: Mapping[str, Tensor], into: Mapping[str, Tensor], what: str, is_whole: bool = True) -> None:
    wrong = sorted(name for name in given if name not in into or into[name].shape != given[name].shape)
    wrong += sorted(set(into) - set(given)) if is_whole else []
    if wrong:
        raise UserError(f"The checkpoint is of another model: {what} {_some(wrong)} does not fit")
    for name, value in given.items():
        into[name].copy_(value)


def _digest(value: Tensor) -> str:
    """Of a buffer's bytes: batch norms change theirs without a gradient, and not all of them tell."""
    flat = value.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().data, digest_size=16).hexdigest()


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
