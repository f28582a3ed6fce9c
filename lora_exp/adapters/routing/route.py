"""The plan that holds for a call, and how often each adapter has run.

One `Route` is shared by all adapted layers of a model; a layer made on its own has one to itself.
What is chosen holds for the thread that chose it.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from lora_exp.adapters.numerics.dropout import distinct_seed, draw_seed, rank, seed_from
from lora_exp.adapters.numerics.typed_torch import not_compiled
from lora_exp.adapters.routing.checkpoint_replay import graph_task, saves_plainly, top_hook
from lora_exp.adapters.routing.passes import Calls, Replay
from lora_exp.adapters.routing.plan import Plan
from lora_exp.adapters.routing.threads import Local, Scope
from lora_exp.adapters.routing.traces import Traces
from lora_exp.errors import UserError


@dataclasses.dataclass
class Clock:
    """What an adapter's dropout masks follow from: its own seed and its own count of training passes."""

    seed: int
    passes: int = 0


class Route:
    batches_lanes = False  # whether slices of one size go through their adapters by one batched product

    def __init__(self, plan: Plan | None = None) -> None:
        self.chosen = plan or Plan()  # for threads that chose nothing themselves
        self.clocks: dict[str, Clock] = {}
        self.trained: tuple[str, ...] = ()  # whom the last training pass served
        self.merged: str | None = None  # the adapter in the weights, which replays must find as their pass did
        self.evaluates = False  # whether the model was last set to eval mode
        self._forget_threads()

    def plan(self) -> Plan:
        """The plan that holds for the layer call at hand, be it live or a replay."""
        thread = self._local.thread
        plan = self.chosen if thread.plan is None else thread.plan
        if torch.compiler.is_compiling():
            return plan
        scope = thread.scopes[-1]
        if graph_task() != scope.task or not saves_plainly():  # checkpointed or replayed
            return self._where()[0]
        if not torch.is_grad_enabled():
            thread.spans.note(plan, scope.calls, self.merged)
        return plan

    @property
    def live(self) -> Plan:
        """The plan of this thread, outside of replays."""
        plan = self._local.thread.plan
        return self.chosen if plan is None else plan

    @live.setter
    def live(self, plan: Plan) -> None:
        thread = self._local.thread
        thread.choose(plan)
        if len(thread.scopes) == 1:
            self.chosen = plan

    @contextmanager
    def using(self, plan: Plan, holds: str | None = None) -> Iterator[None]:
        """`plan` for this thread; meanwhile the adapter `holds` cannot be deleted."""
        scope = Scope(plan, holds=holds)
        if not torch.compiler.is_compiling():
            scope.task, scope.calls = graph_task(), self._where()[1]
        self._local.thread.enter(scope)
        try:
            yield
        finally:
            self.leave(scope)

    @not_compiled
    def enter_pass(self, inputs: Sequence[object], trains: bool) -> Scope:
        """Begin a forward pass, or its replay as a whole; in training mode its dropout calls are counted."""
        plan, calls = self._where()
        plan = plan if plan.sizes is None else plan.for_inputs(inputs)
        if trains:
            calls = self._calls_of_pass(plan)
        elif torch.is_grad_enabled() and graph_task() == -1:
            self.trained = plan.names
        scope = Scope(plan, graph_task(), calls)
        self._local.thread.enter(scope)
        return scope

    def leave(self, scope: Scope) -> None:
        assert scope.thread is not None
        scope.thread.leave(scope)

    def pass_at_hand(self) -> object | None:
        """One object for all calls of one training pass and their replays, and for no other; None outside."""
        calls = self._where()[1]
        return None if calls is None else calls.numbers  # which replays share

    @not_compiled
    def mask_seed(self, name: str, layer_key: int) -> int:
        """The seed of one adapter's dropout mask for a call of a layer, the same when the call is replayed."""
        scope = self._local.thread.scopes[-1]
        is_usual = graph_task() == scope.task and saves_plainly()  # what the layer's own plan() has noted
        calls = scope.calls if is_usual else self._where()[1]
        if calls is None or name not in calls.numbers:
            return distinct_seed(draw_seed())  # no LoraModel around: the global RNG, as nn.Dropout
        seed, passes = calls.numbers[name]
        return seed_from(seed, passes, layer_key, calls.rank, calls.count(name, layer_key))

    def check_deletable(self, name: str) -> None:
        """Raises if an open context or a running pass of any thread needs the adapter."""
        living = [thread for thread in list(self._traces.threads) if thread.runs_in.is_alive()]
        if any(scope.needs(name) for thread in living for scope in list(thread.scopes)):
            raise UserError(
                f"adapter {name!r} is needed by an open context (route, or disable_adapter while it is merged) or by a "
                "pass that runs; leave the context, then delete the adapter"
            )

    def forget(self, name: str, instead: Plan) -> None:
        """`name` was deleted: where it served the whole batch, `instead` does."""
        self.clocks.pop(name, None)
        if name in self.chosen.names:
            self.chosen = instead
        self._traces.forget(name, instead)

    # Inside

    def _where(self) -> tuple[Plan, Calls | None]:
        """The plan and the pass that the call at hand belongs to; leaves a trace for a replay of it."""
        thread, top = self._local.thread, top_hook()
        if (replay := self._replay()) is not None:
            plan, calls = replay.plan, replay.calls
        else:
            plan, calls = self.live, thread.scopes[-1].calls
        if top is not None:
            self._traces.note(thread, top, plan, calls, self.merged)
        if not torch.is_grad_enabled():
            thread.spans.note(plan, calls, self.merged)
        return plan, calls

    def _replay(self) -> Replay | None:
        """The replay that we are inside of; None in a call that is none."""
        thread, task = self._local.thread, graph_task()
        if task == thread.scopes[-1].task:
            return None
        return self._traces.replay(thread, top_hook(), task, self.merged, self.evaluates)

    def _calls_of_pass(self, plan: Plan) -> Calls:
        replay = self._replay()
        if replay is not None and (repeated := next(replay.inner, None)) is not None:
            return repeated.again()
        calls = Calls(self._tick(plan), rank())
        if top_hook() is not None:
            self._traces.begin(calls)
        return calls

    def _tick(self, plan: Plan) -> dict[str, tuple[int, int]]:
        """One training pass more for all that it serves; their (seed, passes before)."""
        numbers: dict[str, tuple[int, int]] = {}
        self.trained = plan.names
        with self._lock:
            for name in dict.fromkeys(plan.names):
                if (clock := self.clocks.get(name)) is not None:
                    numbers[name] = clock.seed, clock.passes
                    clock.passes += 1
        return numbers

    def _forget_threads(self) -> None:
        self._traces = Traces()
        self._local = Local(self._traces.threads)
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        base = self._local.thread.scopes[0].plan
        kept = {key: getattr(self, key) for key in ("clocks", "trained", "merged", "evaluates", "batches_lanes")}
        return {"chosen": base or self.chosen, **kept}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._forget_threads()
