"""What a forward pass leaves behind so that a checkpoint's replay in its backward pass finds it again.

A pass counts the dropout calls of each layer, because a layer that is called several times draws a mask a call.
A replay repeats a part of a pass and must count on from where that part began, which is called a place.
"""

from __future__ import annotations

import dataclasses
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

from lora_exp.adapters.routing.checkpoint_replay import moment
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.routing.plan import Plan

_REMEMBERED = 4096  # spans a thread


class Calls:
    """The dropout calls of one pass in order; `numbers` holds (seed, passes before) of each adapter served."""

    __slots__ = ("_before", "_counts", "_keys", "_moments", "numbers", "rank", "started")

    def __init__(self, numbers: dict[str, tuple[int, int]], rank: int, before: Counter[int] | None = None) -> None:
        self.numbers, self.rank = numbers, rank
        self.started = moment() if before is None else -1  # a part of a pass has no start of its own
        self._before = before or Counter()
        self._counts = Counter(self._before)
        self._keys, self._moments = array("q"), array("q")

    def count(self, name: str, layer_key: int) -> int:
        """How often this layer was called with this adapter before, and one call more from now on."""
        key = hash((name, layer_key))
        index = self._counts[key]
        self._counts[key] = index + 1
        self._keys.append(key)
        self._moments.append(moment())
        return index

    def __len__(self) -> int:
        return len(self._keys)

    def since(self, time: int) -> int:
        """How many calls were made up to a moment."""
        return bisect_right(self._moments, time)

    def again(self, position: int | None = None) -> Calls:
        """A replay of the whole pass, or of the part that starts after `position` calls."""
        before = None if position is None else self._before + Counter(self._keys[:position])
        return Calls(self.numbers, self.rank, before)


@dataclasses.dataclass
class Place:
    """Where a checkpointed part began: under which plan, after how many calls of which pass; `inner` are
    the passes that began inside it. `merged` was in the weights; `gone` names a deleted adapter that the plan needs."""

    plan: Plan
    calls: Calls | None
    position: int
    merged: str | None
    inner: list[Calls] = dataclasses.field(default_factory=list)
    gone: str | None = None

    def replay(self, merged: str | None, evaluates: bool) -> Replay:
        """`merged` is in the weights now; `evaluates`: the model is in eval mode now."""
        if merged != self.merged:
            raise UserError(
                f"a checkpointed pass was made with {self.merged or 'no adapter'} merged into the weights, and now "
                f"{merged or 'none'} is, so backward cannot repeat it; call backward() before merge() or unmerge()"
            )
        if evaluates and any(calls is not None and len(calls) for calls in (self.calls, *self.inner)):
            raise UserError(
                "a checkpointed pass was made in training mode, with dropout, and now the model is in eval mode, so "
                "backward cannot repeat its masks; call backward() before eval(), or train() before backward()"
            )
        if self.gone is not None:
            raise UserError(
                f"a checkpointed pass went through adapter {self.gone!r}, which was deleted before the backward "
                "pass came to it; call backward() first, then delete the adapter"
            )
        calls = None if self.calls is None else self.calls.again(self.position)
        return Replay(self.plan, calls, iter(self.inner))


@dataclasses.dataclass
class Replay:
    """One replay of what began at a place."""

    plan: Plan
    calls: Calls | None
    inner: Iterator[Calls]


@dataclasses.dataclass(slots=True)
class _Span:
    """Calls without gradients that followed each other under one plan in one pass, the last of them at `last`."""

    last: int
    plan: Plan
    calls: Calls | None
    merged: str | None
    gone: str | None = None


class Spans:
    """A thread's calls without gradients: a reentrant checkpoint runs its forward so, and leaves no other trace."""

    def __init__(self) -> None:
        self._spans: list[_Span] = []
        self._forgotten = -1

    def note(self, plan: Plan, calls: Calls | None, merged: str | None) -> None:
        if self._spans:
            last = self._spans[-1]
            is_same = last.calls is calls and (last.plan is plan or last.plan == plan)
            if is_same and last.merged == merged and last.gone is None:
                last.last = moment()
                return
        self._spans.append(_Span(moment(), plan, calls, merged))
        if len(self._spans) > _REMEMBERED:
            self._forgotten = self._spans[_REMEMBERED // 2 - 1].last
            del self._spans[: _REMEMBERED // 2]

    def place_after(self, time: int) -> Place | None:
        """Where the first call after the moment `time` was made; None if there was none."""
        if time < self._forgotten:
            raise UserError(
                f"a checkpointed pass lies more than {_REMEMBERED // 2} passes or switches back and cannot be "
                "replayed any more; call backward() sooner, or checkpoint with use_reentrant=False"
            )
        first = bisect_right(self._spans, time, key=lambda span: span.last)
        if first == len(self._spans):
            return None
        span = self._spans[first]
        begun = [s.calls for s in self._spans[first:] if s.calls is not None and s.calls.started > time]
        inner = list({id(calls): calls for calls in begun}.values())
        if span.calls is None or span.calls.started > time:
            return Place(span.plan, None, 0, span.merged, inner, span.gone)
        return Place(span.plan, span.calls, span.calls.since(time), span.merged, inner, span.gone)

    def forget(self, name: str) -> None:
        for span in self._spans:
            if name in span.plan.names:
                span.gone = name
