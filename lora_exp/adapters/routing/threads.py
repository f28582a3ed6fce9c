"""What one thread has chosen and is doing with a model's adapters."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import weakref
from typing import TYPE_CHECKING

from lora_exp.adapters.routing.checkpoint_replay import Hook
from lora_exp.adapters.routing.passes import Calls, Replay, Spans

if TYPE_CHECKING:
    from lora_exp.adapters.routing.plan import Plan

_REMEMBERED = 32  # threads that have ended


@dataclasses.dataclass(slots=True, eq=False)
class Scope:
    """What holds inside a context or a pass; `task`: the backward pass in which it was entered (-1: none).

    `plan` is None where the thread follows the model's choice. `holds`: an adapter that the context will need.
    """

    plan: Plan | None = None
    task: int = -1
    calls: Calls | None = None
    holds: str | None = None
    thread: Thread | None = None  # that entered it

    def needs(self, name: str) -> bool:
        """Whether adapter `name` must stay until this is left."""
        is_routed = self.plan is not None and self.plan.sizes is not None and name in self.plan.names
        return is_routed or self.holds == name or (self.calls is not None and name in self.calls.numbers)


class Thread:
    """Its scopes, the innermost last, and what its passes left behind for replays.

    `plan` is the innermost scope's: what compiled code reads, as it would be compiled anew for each scope.
    """

    def __init__(self) -> None:
        self.runs_in = threading.current_thread()
        self.scopes = [Scope()]
        self.plan: Plan | None = None
        self.spans = Spans()
        self.noted: weakref.ref[Hook] | None = None  # the checkpoint's hook that was seen last
        self.replays: weakref.WeakKeyDictionary[Hook, Replay] = weakref.WeakKeyDictionary()
        self.reentrant: tuple[tuple[int, int], Replay | None] = (-1, -1), None  # the last one

    def enter(self, scope: Scope) -> None:
        scope.thread = self
        self.scopes.append(scope)
        self.plan = scope.plan

    def leave(self, scope: Scope) -> None:
        self.scopes.remove(scope)
        self.plan = self.scopes[-1].plan

    def choose(self, plan: Plan) -> None:
        """For as long as the innermost scope lasts."""
        self.scopes[-1].plan = self.plan = plan

    def forget(self, name: str, instead: Plan) -> None:
        """`instead` where adapter `name` was chosen."""
        for scope in list(self.scopes):
            if scope.plan is not None and name in scope.plan.names:
                scope.plan = instead
        self.plan = self.scopes[-1].plan
        self.spans.forget(name)


class Local(threading.local):
    """`threads` has those that live, and the last that ended: their passes may still be replayed elsewhere."""

    def __init__(self, threads: list[Thread]) -> None:
        ended = [thread for thread in list(threads) if not thread.runs_in.is_alive()]
        for thread in ended[:-_REMEMBERED]:
            with contextlib.suppress(ValueError):  # another new thread was faster
                threads.remove(thread)
        self.thread = Thread()
        threads.append(self.thread)
