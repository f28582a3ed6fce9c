"""Regular expressions from anywhere, matched against module names in bounded time.

Python's `re` backtracks: `(a+)+$` takes time that doubles with each letter of a name, holds the interpreter's
lock meanwhile, and an adapter_config.json from elsewhere may bring it. Simple expressions are left to `re`; any
other is followed here for all positions of the name at once, which needs no backtracking.
"""

from __future__ import annotations

import functools
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from lora_exp.errors import UserError

_IN_RE = sys.version_info >= (3, 11)
_parser = importlib.import_module("re._parser" if _IN_RE else "sre_parse")
_compiler = importlib.import_module("re._compiler" if _IN_RE else "sre_compile")

_LONGEST = 20_000  # characters
_SIMPLE = 2**17  # ways through a name that `re` may try in the worst case: two stars and a few choices
_FIRST_STEPS, _STEPS_A_NAME = 200_000, 3_000  # ten times of what honest ones take, and soon over
_ONE_CHARACTER = ("LITERAL", "NOT_LITERAL", "IN", "ANY")
_Node = tuple[Any, Any]


class _State(Protocol):
    flags: int


class _Tree(Protocol):
    """A parsed expression, or a part of one."""

    state: _State

    def getwidth(self) -> tuple[int, int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> _Node: ...

    def __iter__(self) -> Iterator[_Node]: ...


def full_match(pattern: str, name: str) -> bool:
    """As `re.fullmatch`. Raises UserError for what is no expression or cannot be followed in bounded time."""
    return _matcher(pattern).fits(name)


def suffix_match(pattern: str, name: str) -> bool:
    """Whether the expression covers a name or a dotted suffix of it, as PEFT reads rank and alpha patterns."""
    return full_match(rf"(.*\.)?({pattern})", name)


def prefix_match(pattern: str, name: str) -> re.Match[str] | None:
    """As `re.match`, for simple expressions alone."""
    matcher = _matcher(pattern)
    if matcher.simple is None:
        raise UserError(f"{pattern!r} could take for ever to match; write it with fewer repetitions, none nested")
    return matcher.simple.match(name)


@functools.lru_cache(maxsize=4096)
def _matcher(pattern: str) -> _Matcher:
    if len(pattern) > _LONGEST:
        raise UserError(f"{pattern[:40]!r}... has {len(pattern)} characters; at most {_LONGEST} are read")
    try:
        tree = _parser.parse(pattern)
        return _Matcher(pattern, tree, re.compile(pattern) if _ways(tree) <= _SIMPLE else None)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{pattern!r} is not a regular expression ({error})") from error


class _Matcher:
    def __init__(self, pattern: str, tree: _Tree, simple: re.Pattern[str] | None) -> None:
        self.pattern = pattern
        self.simple = simple
        self.tree = tree
        self.names, self.steps = 0, 0
        self._leaves: dict[int, re.Pattern[str]] = {}
        if simple is None:
            self._after(list(tree), {0}, "", tree.state.flags)  # refuses now what it does not know

    def fits(self, name: str) -> bool:
        if self.simple is not None:
            return self.simple.fullmatch(name) is not None
        self.names += 1
        return len(name) in self._after(self.tree, {0}, name, self.tree.state.flags)

    def _after(self, nodes: Iterable[_Node], places: set[int], name: str, flags: int) -> set[int]:
        """Where a sequence of nodes may end that starts at any of `places`."""
        for node in nodes:
            self.steps += 1 + len(places)
            if self.steps > _FIRST_STEPS + _STEPS_A_NAME * self.names:
                raise UserError(f"{self.pattern!r} takes too long to match; write it without nested repetitions")
            places = self._step(node, places, name, flags)
        return places

    def _step(self, node: _Node, places: set[int], name: str, flags: int) -> set[int]:
        kind, about = str(node[0]), node[1]
        if kind in _ONE_CHARACTER or kind == "AT":
            leaf, width = self._leaf(node, flags), int(kind != "AT")
            return {place + width for place in places if leaf.match(name, place)}
        if kind == "BRANCH":
            return set().union(*[self._after(way, places, name, flags) for way in about[1]])
        if kind == "SUBPATTERN" and not about[2]:
            return self._after(about[3], places, name, flags | about[1])
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, item = about
            return self._repeated(least, most, item, places, name, flags)
        if kind in ("ASSERT", "ASSERT_NOT"):
            direction, item = about
            seen = {place for place in places if self._looks(direction, item, place, name, flags)}
            return seen if kind == "ASSERT" else places - seen
        if kind == "FAILURE":
            return set()
        raise UserError(f"{self.pattern!r} uses {kind.lower()}, which is not read here; spell the names out")

    def _repeated(self, least: int, most: int, item: _Tree, places: set[int], name: str, flags: int) -> set[int]:
        # After more rounds than there are letters only an item that can be empty goes on, and it stays where it is.
        least, most = min(least, 2 * len(name) + 2), min(most, 4 * len(name) + 4)
        for _ in range(least):
            places = self._after(item, places, name, flags)
        reached = fresh = places
        for _ in range(most - least):
            fresh = self._after(item, fresh, name, flags) - reached
            if not fresh:
                break
            reached = reached | fresh
        return reached

    def _looks(self, direction: int, item: _Tree, place: int, name: str, flags: int) -> bool:
        if direction > 0:
            return bool(self._after(item, {place}, name, flags))
        start = place - item.getwidth()[0]
        return start >= 0 and place in self._after(item, {start}, name, flags)

    def _leaf(self, node: _Node, flags: int) -> re.Pattern[str]:
        """One node as an expression of its own, so that `re` says what a class or an anchor means."""
        if id(node) not in self._leaves:
            self._leaves[id(node)] = _compiler.compile(_parser.SubPattern(self.tree.state, [node]), flags)
        return self._leaves[id(node)]


def _ways(nodes: Iterable[_Node]) -> int:
    """How many ways through a name `re` may have to try; more than _SIMPLE for what only `_Matcher` follows."""
    total = 1
    for node_kind, about in nodes:
        kind = str(node_kind)
        if kind == "BRANCH":
            total *= sum(_ways(way) for way in about[1])
        elif kind == "SUBPATTERN":
            total *= _ways(about[3])
        elif kind in ("ASSERT", "ASSERT_NOT"):
            total *= _ways(about[1])
        elif kind in ("MAX_REPEAT", "MIN_REPEAT"):
            total *= _repeated_ways(*about)
        elif kind not in (*_ONE_CHARACTER, "AT"):
            return _SIMPLE + 1
    return total


def _repeated_ways(least: int, most: int, item: _Tree) -> int:
    if most <= 1:
        return 1 + _ways(item)
    is_one_character = len(item) == 1 and str(item[0][0]) in _ONE_CHARACTER
    if not is_one_character:
        return _SIMPLE + 1
    return 1 if least == most else 128
