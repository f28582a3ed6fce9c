"""Which adapter serves which part of the batch, and how often each adapter has run.

One `Route` is shared by all adapted layers of a model; a layer made on its own has one to itself.
What is chosen holds for the thread that chose it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .passes import Calls, Place, Replay, Spans
from .replay import Hook, checkpoint_frames, graph_task, is_at_checkpoint, is_checkpoints, node_number, top_hook

BASE = "__base__"  # the name that routes samples through the frozen model alone, as in PEFT
_REMEMBERED_THREADS = 32
_UNSEEN = (
    "a checkpointed block is replayed whose first run this model has not seen, so its adapters are not known; were "
    "they added or copied in between, did another thread run it long ago, or is this version of torch not known?"
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """`sizes` None: `names[0]` serves the whole batch (no name: the base alone).

    Otherwise names[i] serves the next sizes[i] samples. `rows` is the number of rows one sample takes in
    a layer whose input came flattened to (batch * rows, ...).
    """

    names: tuple[str, ...] = ()
    sizes: tuple[int, ...] | None = None
    rows: int = 1

    def for_inputs(self, inputs: Sequence[object]) -> Plan:
        """The plan with `rows` read off the model's inputs: (batch, rows, ...)."""
        batch = sum(self.sizes or ())
        for value in inputs:
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[0] == batch:
                return dataclasses.replace(self, rows=value.shape[1])
        return self

    def split(self, length: int) -> list[tuple[str, int, int]]:
        """(name, start, stop) along a leading dimension of `length`."""
        assert self.sizes is not None
        batch = sum(self.sizes)
        if length not in (batch, batch * self.rows):
            raise ValueError(
                f"routing covers {batch} samples ({_described(self)}), but a layer was called with a leading "
                f"dimension of {length}; make the routed sizes add up to the batch, and do not adapt layers "
                "that see a regrouped batch (a mixture's experts)"
            )
        step = length // batch
        stops = list(itertools.accumulate(size * step for size in self.sizes))
        starts = [0, *stops[:-1]]
        return [span for span in zip(self.names, starts, stops, strict=True) if span[2] > span[1]]


@dataclasses.dataclass
class Clock:
    """What an adapter's dropout masks follow from: its own seed and its own count of training passes."""

    seed: int
    passes: int = 0


@dataclasses.dataclass(slots=True, eq=False)
class _Scope:
    """What holds inside a context or a pass; `task`: the backward pass in which it was entered (-1: none).

    `plan` is None where the thread follows the model's choice. `holds`: an adapter that the context will need.
    """

    plan: Plan | None = None
    task: int = -1
    calls: Calls | None = None
    holds: str | None = None
    among: list[_Scope] | None = None  # the scopes of the thread that entered it


class _Thread:
    """One thread's scopes, the innermost last, and what its passes left behind for replays."""

    def __init__(self) -> None:
        self.runs_in = threading.current_thread()
        self.scopes = [_Scope()]
        self.spans = Spans()
        self.noted: weakref.ref[Hook] | None = None  # the checkpoint's hook that was seen last
        self.replays: weakref.WeakKeyDictionary[Hook, Replay] = weakref.WeakKeyDictionary()
        self.reentrant: tuple[tuple[int, int], Replay | None] = (-1, -1), None  # the last one


class _Local(threading.local):
    """`threads` has those that live, and the last that ended: their passes may still be replayed elsewhere."""

    def __init__(self, threads: list[_Thread]) -> None:
        ended = [thread for thread in threads if not thread.runs_in.is_alive()]
        for thread in ended[:-_REMEMBERED_THREADS]:
            threads.remove(thread)
        self.thread = _Thread()
        threads.append(self.thread)


class Route:
    def __init__(self, plan: Plan | None = None) -> None:
        self.chosen = plan or Plan()  # for threads that chose nothing themselves
        self.clocks: dict[str, Clock] = {}
        self.trained: tuple[str, ...] = ()  # whom the last training pass served
        self._forget_threads()

    def plan(self) -> Plan:
        """The plan that holds for the layer call at hand, be it live or a replay."""
        thread = self._local.thread
        scope = thread.scopes[-1]
        plan = self.chosen if scope.plan is None else scope.plan
        if torch.compiler.is_compiling():
            return plan
        if graph_task() != scope.task or top_hook() is not None:  # checkpointed or replayed
            return self._where()[0]
        if not torch.is_grad_enabled():
            thread.spans.note(plan, scope.calls)
        return plan

    @property
    def live(self) -> Plan:
        """The plan of this thread, outside of replays."""
        plan = self._local.thread.scopes[-1].plan
        return self.chosen if plan is None else plan

    @live.setter
    def live(self, plan: Plan) -> None:
        scopes = self._local.thread.scopes
        scopes[-1].plan = plan
        if len(scopes) == 1:
            self.chosen = plan

    @contextmanager
    def using(self, plan: Plan, holds: str | None = None) -> Iterator[None]:
        """`plan` for this thread; meanwhile the adapter `holds` cannot be deleted."""
        scope = _Scope(plan, holds=holds)
        self._push(scope) if torch.compiler.is_compiling() else self.enter(scope)
        try:
            yield
        finally:
            self.leave(scope)

    @torch.compiler.disable
    def enter_pass(self, inputs: Sequence[object], trains: bool) -> _Scope:
        """Begin a forward pass, or its replay as a whole; in training mode its dropout calls are counted."""
        plan, calls = self._where()
        plan = plan if plan.sizes is None else plan.for_inputs(inputs)
        calls = self._calls_of_pass(plan) if trains else calls
        return self._push(_Scope(plan, graph_task(), calls))

    @torch.compiler.disable
    def enter(self, scope: _Scope) -> _Scope:
        scope.task, scope.calls = graph_task(), self._where()[1]
        return self._push(scope)

    def leave(self, scope: _Scope) -> None:
        assert scope.among is not None
        scope.among.remove(scope)

    @torch.compiler.disable
    def mask_seed(self, name: str, layer_key: int) -> int:
        """The seed of one adapter's dropout mask for a call of a layer, the same when the call is replayed."""
        calls = self._where()[1]
        if calls is None or name not in calls.numbers:
            return _distinct(draw_seed(), _rank())  # no LoraModel around: the global RNG, as nn.Dropout
        seed, passes = calls.numbers[name]
        return _hashed(f"{seed}:{passes}:{layer_key}:{calls.rank}:{calls.count(name, layer_key)}")

    def check_deletable(self, name: str) -> None:
        """Raises if an open context of any thread needs the adapter."""
        for scope in self._scopes():
            is_routed = scope.plan is not None and scope.plan.sizes is not None and name in scope.plan.names
            if is_routed or scope.holds == name:
                raise ValueError(
                    f"adapter {name!r} is needed by an open context (route, or disable_adapter while it is merged); "
                    "leave the context, then delete the adapter"
                )

    def forget(self, name: str, instead: Plan) -> None:
        """`name` was deleted: where it served the whole batch, `instead` does."""
        self.clocks.pop(name, None)
        for scope in self._scopes():
            if scope.plan is not None and name in scope.plan.names:
                scope.plan = instead
        if name in self.chosen.names:
            self.chosen = instead
        for place in list(self._regions.values()):
            if name in place.plan.names:
                place.gone = name
        for thread in list(self._threads):
            thread.spans.forget(name)

    # Inside

    def _where(self) -> tuple[Plan, Calls | None]:
        """The plan and the pass that the call at hand belongs to; leaves a trace for a replay of it."""
        thread, top = self._local.thread, top_hook()
        replay = self._replay(thread, top)
        if replay is not None:
            plan, calls = replay.plan, replay.calls
        else:
            plan, calls = self.live, thread.scopes[-1].calls
        if top is not None and (thread.noted is None or thread.noted() is not top):
            for frame in checkpoint_frames()[0]:
                if frame not in self._regions:
                    self._regions[frame] = Place(plan, calls, 0 if calls is None else len(calls))
            thread.noted = weakref.ref(top) if is_checkpoints(top) else None
        if not torch.is_grad_enabled():
            thread.spans.note(plan, calls)
        return plan, calls

    def _replay(self, thread: _Thread, top: Hook | None) -> Replay | None:
        """The replay that we are inside of; None in a call that is none."""
        task = graph_task()
        if task == thread.scopes[-1].task:
            return None
        if top is not None:
            if (known := thread.replays.get(top)) is not None:
                return known
            _, frame, hook = checkpoint_frames()
            if hook is not None:
                if hook not in thread.replays:
                    thread.replays[hook] = self._place_of(frame).replay()
                return thread.replays[hook]
        return self._reentrant(thread, task)

    def _place_of(self, frame: Any) -> Place:
        place = self._regions.get(frame)
        if place is None:
            raise RuntimeError(_UNSEEN)
        return place

    def _reentrant(self, thread: _Thread, task: int) -> Replay | None:
        number = node_number()
        if number is None:
            return None
        if thread.reentrant[0] != (task, number):
            place = thread.spans.place_after(number) or self._others_place(thread, number)
            if place is None and is_at_checkpoint():
                raise RuntimeError(_UNSEEN)
            thread.reentrant = (task, number), None if place is None else place.replay()
        return thread.reentrant[1]

    def _others_place(self, thread: _Thread, number: int) -> Place | None:
        """Backward may run in another thread than forward did; autograd's own threads on a GPU always do."""
        places = [t.spans.place_after(number) for t in list(self._threads) if t is not thread]
        found = [place for place in places if place is not None]
        found = [place for place in found if place.calls is not None or place.inner] or found
        if any((place.plan, place.calls) != (found[0].plan, found[0].calls) for place in found[1:]):
            raise ValueError(
                "several threads used this model's adapters, and with reentrant checkpointing it cannot be told which "
                "of them made the pass that backward is at; use checkpoint(..., use_reentrant=False)"
            )
        return found[0] if found else None

    def _calls_of_pass(self, plan: Plan) -> Calls:
        replay = self._replay(self._local.thread, top_hook())
        if replay is not None and (repeated := next(replay.inner, None)) is not None:
            return repeated.again()
        calls = Calls(self._tick(plan), _rank())
        for frame in checkpoint_frames()[0] if top_hook() is not None else ():
            if (place := self._regions.get(frame)) is not None:
                place.inner.append(calls)
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

    def _push(self, scope: _Scope) -> _Scope:
        scope.among = self._local.thread.scopes
        scope.among.append(scope)
        return scope

    def _scopes(self) -> list[_Scope]:
        living = [thread for thread in list(self._threads) if thread.runs_in.is_alive()]
        return [scope for thread in living for scope in list(thread.scopes)]

    def _forget_threads(self) -> None:
        self._threads: list[_Thread] = []
        self._local = _Local(self._threads)
        self._regions: weakref.WeakKeyDictionary[Any, Place] = weakref.WeakKeyDictionary()  # by checkpoint frame
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        base = self._local.thread.scopes[0].plan
        return {"chosen": base or self.chosen, "clocks": self.clocks, "trained": self.trained}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_threads()


def _rank() -> int:
    """Which process of a distributed run this is: processes that are seeded alike must not share their masks."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_distributed else 0


def _distinct(seed: int, rank: int) -> int:
    return _hashed(f"{seed}:{rank}") if rank else seed


def _hashed(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_seed() -> int:
    return int(torch.randint(0, 2**62, ()))


def sliced_plan(sizes: Mapping[str, int]) -> Plan:
    """Contiguous slices of the batch, in the mapping's order."""
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 0:
            raise ValueError(f"route: {name!r} was given {size!r} samples; use a whole number of at least 0")
    if not sizes or sum(sizes.values()) == 0:
        raise ValueError(f"route: {dict(sizes)} routes no sample; give at least one adapter a sample")
    return Plan(tuple(sizes), tuple(sizes.values()))


def sampled_plan(names: Sequence[str]) -> Plan:
    """One adapter a sample; neighbours with the same adapter run together."""
    if isinstance(names, str) or not names:
        raise ValueError(f"route_samples: {names!r} is not a list with one adapter name a sample")
    runs = [(name, len(list(group))) for name, group in itertools.groupby(names)]
    return Plan(tuple(name for name, _ in runs), tuple(size for _, size in runs))


def _described(plan: Plan) -> str:
    assert plan.sizes is not None
    return ", ".join(f"{name}: {size}" for name, size in zip(plan.names, plan.sizes, strict=True))
