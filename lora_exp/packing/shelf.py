"""What jobs of one process share: each thing is made once, and kept until a job asks for another of its kind."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from lora_exp.machine import launch

_Thing = TypeVar("_Thing")


class Shelf:
    """One thing of each ``kind``, with the ``key`` that it was made for: compared by ``==``, as configs are."""

    def __init__(self) -> None:
        self._things: dict[str, tuple[object, Any]] = {}

    def take(self, kind: str, key: object, make: Callable[[], _Thing]) -> _Thing:
        """The one that is there, if it was made for an equal ``key``; else another, made once that one is gone."""
        known = self._things.get(kind)
        if known is not None and known[0] == key:
            found: _Thing = known[1]
            return found
        del known  # or it would be in memory beside the new one
        self.drop(kind)
        made = make()
        self._things[kind] = key, made
        return made

    def held(self, kind: str) -> Any:
        """The one that is there, whatever it was made for; None if there is none."""
        return self._things.get(kind, (None, None))[1]

    def drop(self, *kinds: str) -> None:
        """Forget those that are there; all of them without a name."""
        for kind in kinds or tuple(self._things):
            self._things.pop(kind, None)


_shelf = Shelf()
_open = False


def current() -> Shelf | None:
    """The process's; None where each job makes its own."""
    return _shelf if _open else None


@contextlib.contextmanager
def shared() -> Iterator[Shelf]:
    """Jobs share in this block. What is on the shelf stays: a sweeper may launch its jobs in several batches.

    Nothing is shared where several processes do each job's work together: the others would have to share alike.
    """
    global _open
    before, _open = _open, launch.current() is None
    try:
        yield _shelf
    finally:
        _open = before
