"""Lanes in one pass: their rows in one batch over the frozen base, each slice through its own adapter.

The loss is the sum of the lanes' means, so that each lane's gradients are its own. What a row comes to may depend, in
its last bits, on how many rows are multiplied with it and on its place among them. So a lane that leaves before its
time has its place taken by another, or else its last rows go on through the base alone: the others' bits stay.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_exp.adapters import LoraModel
from lora_exp.adapters.joint import JointModel, why_alone
from lora_exp.config import Config
from lora_exp.machine.distributed import ALONE
from lora_exp.packing.stem import Stem
from lora_exp.training.lane import Lane
from lora_exp.training.loop import Forward, Passed, passes
from lora_exp.training.objectives import Batch

log = logging.getLogger(__name__)
Reply = Callable[[], Passed]
MakeJoint = Callable[[torch.device], JointModel]


@dataclass(frozen=True)
class Asked:
    """One optimizer step that a lane waits for, with the batches that it has drawn for it."""

    config: Config
    forward: Forward
    lane: Lane
    drawn: Sequence[Sequence[Batch]]

    def alone(self) -> Passed:
        """The step by itself."""
        return passes(self.forward, [self.lane], self.drawn)


@dataclass
class _Place:
    """A slice of the batch. ``left``: the passes that its lane was to make yet. ``owner``: None where it is gone."""

    name: str
    lane: Lane
    drawn: Sequence[Batch]
    left: int = 0
    owner: object | None = None


class Company:
    """Answers the steps of lanes that train at once, by a model over their frozen weights."""

    def __init__(self, make_joint: MakeJoint) -> None:
        self.is_joined = True
        self.joined_passes = 0  # optimizer steps that were made for several at once
        self._make_joint = make_joint
        self._joint: JointModel | None = None
        self.stem: Stem | None = None
        self._places: list[_Place] = []
        self._made = 0

    def answer(self, waiting: Mapping[object, Asked]) -> dict[object, Reply]:
        """A reply for each lane's step. Where they cannot share a pass, each is to make its own."""
        alone: dict[object, Reply] = {owner: asked.alone for owner, asked in waiting.items()}
        if not self.is_joined:
            return alone
        self._seat(waiting)
        if len(self._places) < 2 or len({_form(place.drawn[0]) for place in self._places}) > 1:
            return alone
        found = self._pass(next(iter(waiting.values())).forward)
        return alone if found is None else {owner: _given(found[owner]) for owner in waiting}

    def give_up(self, reason: Exception | str) -> None:
        """From here on each lane makes its own passes."""
        if isinstance(reason, Exception):
            log.debug("lanes make their own passes", exc_info=reason)
            reason = f"{type(reason).__name__}: {str(reason).splitlines()[:1]}"
        log.warning(f"lanes make their own passes from here on: {reason}")
        self.is_joined = False
        self._places, self._joint = [], None

    # Places

    def _seat(self, waiting: Mapping[object, Asked]) -> None:
        for place in self._places:
            if place.owner is not None and place.owner not in waiting:
                self._leave(place)
        for owner, asked in waiting.items():
            if reason := self._why_alone(owner, asked):
                self.give_up(reason)
                return
            self._place_of(owner, asked)
        for place in self._places:
            place.left -= 1
        self._places = [place for place in self._places if place.owner is not None or place.left >= 0]
        self._share_rows()

    def _why_alone(self, owner: object, asked: Asked) -> str | None:
        if any(place.owner is owner for place in self._places):
            return None
        model = asked.forward.model
        return why_alone(model) if isinstance(model, LoraModel) else "it is not our library's"

    def _place_of(self, owner: object, asked: Asked) -> None:
        own = next((place for place in self._places if place.owner is owner), None)
        if own is None:
            own = next((place for place in self._places if _fits(place, asked)), None)
            if own is None:
                own = _Place(f"lane_{self._made}", asked.lane, asked.drawn[0])
                self._made += 1
                self._places.append(own)
            self._enter(own, owner, asked)
        own.lane, own.drawn = asked.lane, asked.drawn[0]
        own.left = asked.lane.timetable.steps - asked.lane.state.step

    def _enter(self, place: _Place, owner: object, asked: Asked) -> None:
        joint = self._model(asked)
        assert isinstance(asked.forward.model, LoraModel)
        joint.borrow(place.name, asked.forward.model)
        joint.train()
        place.owner = owner

    def _leave(self, place: _Place) -> None:
        assert self._joint is not None
        self._joint.give_back(place.name)
        place.owner, place.lane = None, _shadow(place.lane)

    def _share_rows(self) -> None:
        """Where the same rows go through the lowest layers once, one that is gone needs none of its own."""
        if self.stem is None or not self.stem.is_used:
            return
        drawn = [place.drawn for place in self._places if place.owner is not None]
        for gone in (place for place in self._places if place.owner is None):
            alike = (each for each in drawn if _sizes_of(each) == _sizes_of(gone.drawn))
            gone.drawn = next(alike, gone.drawn)

    def _model(self, asked: Asked) -> JointModel:
        if self._joint is None:
            self._joint = self._make_joint(asked.forward.device)
            self.stem = Stem(self._joint)
            if asked.config.train.gradient_checkpointing:
                from lora_exp.models import checkpoint_layers

                checkpoint_layers(self._joint.wrapped)
        return self._joint

    # Passes

    def _pass(self, like: Forward) -> dict[object, Passed] | None:
        """One for all places; None where it had to be given up, and nothing of it is left."""
        assert self._joint is not None
        forward = joined(like, self._joint, self.stem)
        lanes = [replace(place.lane, name=place.name) for place in self._places]
        before = Before(self._joint, lanes, forward.device)
        try:
            found = passes(forward, lanes, [place.drawn for place in self._places])
        except Exception as error:
            before.put_back()
            self.give_up(error)
            return None
        if before.is_drawn():
            before.put_back()
            self.give_up("the model draws random numbers of its own, for all rows at once")
            return None
        self.joined_passes += 1
        each = zip(self._places, found.losses, found.units, strict=True)
        return {place.owner: Passed([loss], [units]) for place, loss, units in each}


def joined(like: Forward, joint: JointModel, stem: Stem | None = None) -> Forward:
    """How one of the lanes makes its passes, for all of them."""
    ours = replace(like, model=joint, route=joint.passing, world=ALONE)
    if stem is None:
        return ours
    return replace(ours, route=lambda sizes: stem.passing(joint.passing(sizes)), join=stem.joining(like.join))


class Before:
    """What a pass changes beside the gradients: to be put back where it counts for nothing."""

    def __init__(self, joint: JointModel, lanes: Iterable[Lane], device: torch.device) -> None:
        self._lanes, self._device = list(lanes), device
        clocks = joint.route_state.clocks
        self._clocks = [(clocks[lane.name], clocks[lane.name].passes) for lane in self._lanes if lane.name in clocks]
        self._drawn = _random(device)

    def is_drawn(self) -> bool:
        """Whether somebody has drawn from a global generator since."""
        return not torch.equal(self._drawn, _random(self._device))

    def put_back(self) -> None:
        for clock, count in self._clocks:
            clock.passes = count
        for lane in self._lanes:
            for parameter in lane.parameters:
                parameter.grad = None


def _random(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _fits(place: _Place, asked: Asked) -> bool:
    """Whether a lane may go on where another is gone: the same rows, so that nobody else sees a difference."""
    return place.owner is None and _sizes_of(place.drawn) == _sizes_of(asked.drawn[0])


def _sizes_of(drawn: Sequence[Batch]) -> list[dict[str, torch.Size]]:
    return [{name: tensor.shape for name, tensor in batch.items()} for batch in drawn]


def _form(batch: Batch) -> str:
    """What rows must have in common to be in one batch."""
    return str({name: (tensor.shape[1:], tensor.dtype) for name, tensor in batch.items()})


def _shadow(lane: Lane) -> Lane:
    """What a pass asks of a lane that is gone, without what it trained."""
    nothing: Any = None
    gone = replace(lane, parameters=[], optimizer=nothing, schedule=nothing, scaler=None)
    return replace(gone, batches=iter(()), evaluation=[])


def _given(found: Any) -> Reply:
    return lambda: found
