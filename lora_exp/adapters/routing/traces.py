"""The traces that passes leave for replays in their backward pass, and how a replay finds its own."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from lora_exp.adapters.routing.checkpoint_replay import (
    Hook,
    checkpoint_frames,
    is_at_checkpoint,
    is_checkpoints,
    node_number,
)
from lora_exp.adapters.routing.passes import Calls, Place, Replay
from lora_exp.adapters.routing.threads import Thread
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.routing.plan import Plan

_UNSEEN = (
    "a checkpointed block is replayed whose first run this model has not seen, so its adapters are not known; were "
    "they added or copied in between, did another thread run it long ago, or is this version of torch not known?"
)


class Traces:
    def __init__(self) -> None:
        self.threads: list[Thread] = []
        self._regions: weakref.WeakKeyDictionary[object, Place] = weakref.WeakKeyDictionary()  # by checkpoint frame

    def note(self, thread: Thread, top: Hook, plan: Plan, calls: Calls | None, merged: str | None) -> None:
        """A call inside of checkpointed parts: where it is the first in them, they began here."""
        if thread.noted is not None and thread.noted() is top:
            return
        for frame in checkpoint_frames()[0]:
            if frame not in self._regions:
                self._regions[frame] = Place(plan, calls, 0 if calls is None else len(calls), merged)
        thread.noted = weakref.ref(top) if is_checkpoints(top) else None

    def begin(self, calls: Calls) -> None:
        """A pass begins inside of checkpointed parts."""
        for frame in checkpoint_frames()[0]:
            if (place := self._regions.get(frame)) is not None:
                place.inner.append(calls)

    def replay(self, thread: Thread, top: Hook | None, task: int, merged: str | None, evaluates: bool) -> Replay | None:
        """The replay that a call in the backward pass `task` is inside of; None in a call that is none.

        `merged` and `evaluates` are what `Place.replay` compares with.
        """
        if top is not None:
            if (known := thread.replays.get(top)) is not None:
                return known
            _, frame, hook = checkpoint_frames()
            if hook is not None:
                if hook not in thread.replays:
                    thread.replays[hook] = self._place_of(frame).replay(merged, evaluates)
                return thread.replays[hook]
        number = node_number()
        if number is None:
            return None
        if thread.reentrant[0] != (task, number):
            place = thread.spans.place_after(number) or self._others_place(thread, number)
            if place is None and is_at_checkpoint():
                raise RuntimeError(_UNSEEN)
            thread.reentrant = (task, number), None if place is None else place.replay(merged, evaluates)
        return thread.reentrant[1]

    def forget(self, name: str, instead: Plan) -> None:
        """Adapter `name` was deleted; `instead` serves where it was chosen."""
        for place in list(self._regions.values()):
            if name in place.plan.names:
                place.gone = name
        for thread in list(self.threads):
            thread.forget(name, instead)

    def _place_of(self, frame: object) -> Place:
        place = self._regions.get(frame)
        if place is None:
            raise RuntimeError(_UNSEEN)
        return place

    def _others_place(self, thread: Thread, number: int) -> Place | None:
        """Backward may run in another thread than forward did; autograd's own threads on a GPU always do."""
        places = [t.spans.place_after(number) for t in list(self.threads) if t is not thread]
        found = [place for place in places if place is not None]
        found = [place for place in found if place.calls is not None or place.inner] or found
        if any((place.plan, place.calls) != (found[0].plan, found[0].calls) for place in found[1:]):
            raise UserError(
                "several threads used this model's adapters, and with reentrant checkpointing it cannot be told which "
                "of them made the pass that backward is at; use checkpoint(..., use_reentrant=False)"
            )
        return found[0] if found else None
