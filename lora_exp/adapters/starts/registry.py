"""Which starts there are: each is a class in a file of its own, registered by its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from lora_exp.adapters.discovery import check_options, import_all
from lora_exp.adapters.starts.start import Start
from lora_exp.errors import UserError

_STARTS: dict[str, type[Start]] = {}
_Start = TypeVar("_Start", bound=type[Start])


def start(name: str) -> Callable[[_Start], _Start]:
    """Class decorator: this class is what `LoraConfig(start=name)` means."""

    def register(kind: _Start) -> _Start:
        if (known := _STARTS.get(name)) is not None and known.__qualname__ != kind.__qualname__:
            raise UserError(f"start {name!r} is registered already, as {known.__module__}.{known.__qualname__}")
        kind.name = name
        _STARTS[name] = kind
        return kind

    return register


def start_named(name: str) -> type[Start]:
    """Raises UserError for a name that is none."""
    import_all("lora_exp.adapters.starts")
    if name not in _STARTS:
        raise UserError(f"start={name!r} is no start; choose one of {', '.join(start_names())}")
    return _STARTS[name]


def start_names() -> list[str]:
    import_all("lora_exp.adapters.starts")
    return sorted(_STARTS)


def make_start(name: str, options: Mapping[str, object]) -> Start:
    """The start with its options. Raises UserError for an option or a value that it does not take."""
    kind = start_named(name)
    check_options("start_options", name, kind, options)
    return kind(**options)
