"""Modules of the user's own (``plugins=[my_module]``): they register variants, layer kinds, kinds of data, metrics."""

from __future__ import annotations

import ast
import importlib
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from lora_exp.errors import UserError
from lora_exp.keys import nearest


class PluginError(UserError):
    """A plugin that cannot be had; ``trace`` is its own traceback where it fails to import, to be filed."""

    def __init__(self, message: str, trace: str | None = None) -> None:
        super().__init__(message)
        self.trace = trace


def import_plugins(names: Sequence[str], folder: Path) -> None:
    """Import each, from ``folder`` (the one that one stands in) or wherever Python finds it. Raises PluginError."""
    if names and str(folder) not in sys.path:
        sys.path.append(str(folder))  # at the end: a file there must not take the place of a library
    for name in names:
        _import(name, folder)


def source_files(name: str) -> dict[str, Path]:
    """The source of a plugin, which is imported, and of what it imports from beside itself; of a package all of it.

    By their paths below the folder that they are imported from.
    """
    first = sys.modules.get(name.partition(".")[0])
    places = [Path(place).parent for place in getattr(first, "__path__", ())]
    file = getattr(first, "__file__", None)
    home = places[0] if places else Path(file).parent if file else None
    if home is None:
        return {}
    found: dict[str, Path] = {}
    _gather(name.partition(".")[0], home, found)
    return dict(sorted(found.items()))


def _gather(name: str, home: Path, found: dict[str, Path]) -> None:
    """The files of a module or package of ``home``, and of those of ``home`` that they import."""
    files = sorted((home / name).rglob("*.py")) if (home / name).is_dir() else [home / f"{name}.py"]
    for file in files:
        key = file.relative_to(home).as_posix()
        if file.is_file() and key not in found:
            found[key] = file
            for other in _imported(file):
                _gather(other, home, found)


def _imported(file: Path) -> set[str]:
    """The first names of what a source imports."""
    tree = list(ast.walk(ast.parse(file.read_text(encoding="utf-8"))))
    names = {alias.name for node in tree if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in tree if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return {name.partition(".")[0] for name in names}


def _import(name: str, folder: Path) -> None:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _failed(name, error) from error
        near = nearest(name, [file.stem for file in sorted(folder.glob("*.py"))])
        hint = f"did you mean {' or '.join(near)}?" if near else "stand in the folder of its file, or install it"
        raise PluginError(f"plugins: {name} is neither in {folder} nor installed: {hint}") from None
    except Exception as error:
        raise _failed(name, error) from error


def _failed(name: str, error: Exception) -> PluginError:
    """Said by the last line that is neither ours nor the import machinery's."""
    room = str(Path(__file__).parent)
    frames = traceback.extract_tb(error.__traceback__)
    places = [
        frame for frame in frames if not frame.filename.startswith((room, "<frozen importlib", importlib.__file__))
    ]
    where = f" at {places[-1].filename}, line {places[-1].lineno}" if places else ""
    if isinstance(error, SyntaxError):
        where = f" at {error.filename}, line {error.lineno}"
    message = f"plugins: {name} fails to import ({type(error).__name__}: {error}){where}: mend it, or leave it out"
    return PluginError(message, "".join(traceback.format_exception(error)))
