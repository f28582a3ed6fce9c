"""Registries that fill themselves: every file of a folder is one entry's, so a new entry is one new file."""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterable

from lora_exp.errors import UserError


@functools.cache
def import_all(package: str) -> None:
    """Import each module of a package, so that what they register is known."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")


def check_options(field: str, name: str, kind: type[object], options: Iterable[str]) -> None:
    """Raise UserError for an option that an entry's class does not take: those are its keyword-only arguments."""
    parameters = inspect.signature(kind).parameters
    known = [key for key, value in parameters.items() if value.kind is inspect.Parameter.KEYWORD_ONLY]
    if unknown := [key for key in options if key not in known]:
        takes = f"it takes {', '.join(known)}" if known else "it takes none"
        raise UserError(f"{field}: {', '.join(unknown)} is no option of {name!r}; {takes}")
