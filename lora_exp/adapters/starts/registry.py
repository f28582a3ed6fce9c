"""Which starts there are: each is a class in a file of its own, registered by its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lora_exp.adapters.starts.start import Start
from lora_exp.errors import UserError
from lora_exp.registry import Registry, check_options

_STARTS: Registry[type[Start]] = Registry("start", "lora_exp.adapters.starts")
_Start = TypeVar("_Start", bound=type[Start])


def start(name: str) -> Callable[[_Start], _Start]:
    """Class decorator: this class is what `LoraConfig(start=name)` means."""

    def register(kind: _Start) -> _Start:
        _STARTS.add(name)(kind)
        kind.name = name
        return kind

    return register


def start_named(name: str) -> type[Start]:
    """Raises UserError for a name that is none."""
    if _STARTS.problem(name):
        raise UserError(f"start={name!r} is no start; choose one of {', '.join(start_names())}")
    return _STARTS[name]


def start_names() -> list[str]:
    return _STARTS.names()


def make_start(name: str, options: Mapping[str, object]) -> Start:
    """The start with its options. Raises UserError for an option or a value that it does not take."""
    kind = start_named(name)
    check_options("start_options", name, kind, options)
    return kind(**options)
