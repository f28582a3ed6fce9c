"""What a name in the config means: each entry registers itself, so that a new one is a new file."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar, cast

from lora_exp.errors import UserError

_Entry = TypeVar("_Entry")
_Given = TypeVar("_Given")


@functools.cache
def import_all(home: str) -> None:
    """Import a module, and each module of a folder, so that what they register is known."""
    for module in pkgutil.iter_modules(getattr(importlib.import_module(home), "__path__", [])):
        importlib.import_module(f"{home}.{module.name}")


class Registry(Generic[_Entry]):
    """The entries that the config key ``key`` chooses from; ours are in ``home``, a module or a folder of modules."""

    def __init__(self, key: str, home: str) -> None:
        self.key = key
        self._home = home
        self._entries: dict[str, object] = {}

    def add(self, name: str) -> Callable[[_Given], _Given]:
        """Decorator of a class or function: this is what ``key=name`` means."""

        def register(entry: _Given) -> _Given:
            if not _module(entry).startswith(self._home):
                self.names()  # ours are there before anybody else's, who may not take their names
            known = self._entries.get(name)
            if known is not None and _place(known) != _place(entry):
                raise UserError(f"{self.key}={name} is registered already, as {_place(known)}: choose another name")
            self._entries[name] = entry
            return entry

        return register

    def __getitem__(self, name: str) -> _Entry:
        """Raises UserError for a name that is not known."""
        if problem := self.problem(name):
            raise UserError(problem)
        return cast(_Entry, self._entries[name])

    def names(self) -> list[str]:
        import_all(self._home)
        return sorted(self._entries)

    def problem(self, name: str) -> str | None:
        """Why ``name`` cannot be chosen; None if it can."""
        if name in self._entries or name in self.names():
            return None
        return f"{self.key}={name} is not known: choose one of {', '.join(self.names())}"


def check_options(field: str, name: str, kind: type[object], options: Iterable[str]) -> None:
    """Raise UserError for an option that an entry's class does not take: those are its keyword-only arguments."""
    parameters = inspect.signature(kind).parameters
    known = [key for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := [key for key in options if key not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UserError(f"{field}: {', '.join(unknown)} is no option of {name!r}; {takes}")


def _module(entry: object) -> str:
    return str(entry.__module__)


def _place(entry: object) -> str:
    return f"{_module(entry)}.{getattr(entry, '__qualname__', '')}"
