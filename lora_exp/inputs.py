"""The files that a config names, looked at but not read: what can be said of them before anything heavy is loaded."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from lora_exp.config import DataConfig, ModelConfig
from lora_exp.errors import UserError

_Section = TypeVar("_Section", bound=DataConfig)
RECORD_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
TEXT_SUFFIXES = (".txt", ".md")


def model_path_problem(named: str, may_be_file: bool = False) -> str | None:
    """A folder in hub layout is asked for; a plan is content with a config.json."""
    path = Path(named).expanduser()
    if (path / "config.json").is_file() or (may_be_file and path.is_file()):
        return None
    if not path.exists():
        return f"model.path={named} has no config.json, as it does not exist: name a folder in hub layout"
    what = "a config.json or a folder in hub layout" if may_be_file else "a folder in hub layout"
    return f"model.path={named} has no config.json: name {what}"


def weights_of(named: object) -> dict[str, float]:
    """A path, a list of paths or {path: weight}: each path with its weight. {} for None; UserError for others."""
    paths = named if isinstance(named, dict) else dict.fromkeys(named if isinstance(named, list) else [named], 1.0)
    if named is None:
        return {}
    if not paths:
        raise UserError("it names no file")
    for path, weight in paths.items():
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not (isinstance(path, str) and path):
            raise UserError(f"{path!r} is no path: name a file, a folder, a list of them, or {{FILE: weight}}")
        if not (is_number and 0 < weight < math.inf):
            raise UserError(f"{path} has the weight {weight}: give a number above 0, or leave the file out")
    return {path: float(weight) for path, weight in paths.items()}


def source_problems(section: DataConfig, suffixes: tuple[str, ...], is_read: bool) -> list[str]:
    """What can be seen to be wrong with the sources that ``section`` names; of files only where they are to be read."""
    found = []
    for split in ("", "validation_", "test_"):
        key, named = f"data.{split}path", getattr(section, f"{split}path")
        try:
            for path in weights_of(named) if is_read else ():
                find_files(path, suffixes, key)
            weights_of(named)
        except UserError as error:
            found.append(str(error) if str(error).startswith(key) else f"{key}={named}: {error}")
    if section.path is not None and section.name:
        found.append(f"data.path={section.path} and data.name={section.name} are two sources: leave one out")
    for key in ("subset", "revision", "split", "validation_split", "test_split"):
        if getattr(section, key) and not section.name:
            found.append(f"data.{key}={getattr(section, key)} is of a dataset of the hub: add data.name=ORG/NAME")
    return found


def find_files(named: str, suffixes: tuple[str, ...], key: str = "data.path") -> tuple[list[Path], list[Path]]:
    """The files of a folder that have one of ``suffixes``, in order, and its others but hidden ones; of a file, itself.

    Raises UserError if there is none.
    """
    path, listed = Path(named).expanduser(), ", ".join(suffixes)
    if not path.exists():
        hub = f", or a dataset of the hub by data.name={named}" if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else ""
        raise UserError(f"{key}={named} does not exist: name a file or a folder{hub}")
    if path.is_file():
        if path.suffix.lower() not in suffixes:
            raise UserError(f"{key}={named} is none of the kinds that are read ({listed}){_renaming(path, suffixes)}")
        return [path], []
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    found = [file for file in files if file.suffix.lower() in suffixes]
    others = [file for file in files if file.suffix.lower() not in suffixes]
    if not found:
        those = f", but {len(others)} others{_renaming(others[0], suffixes)}" if others else ""
        raise UserError(f"{key}={named} holds no {listed} file{those}")
    return found, others


def class_folders(folder: Path) -> list[Path]:
    """The folders inside, in order of their names, but hidden ones and those without a file; [] for a file."""
    if not folder.is_dir():
        return []
    inside = (path for path in folder.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
    return sorted(path for path in inside if next(files_of(path), None))


def files_of(folder: Path) -> Iterator[Path]:
    """The files of one class, also those in folders below, in order; hidden ones are none of it."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.startswith("."))


def is_of_classes(named: object) -> bool:
    """Whether it names folders alone that have a folder a class."""
    try:
        paths = [Path(path).expanduser() for path in weights_of(named)]
    except UserError:
        return False
    return bool(paths) and all(map(class_folders, paths))


def without_class_folders(section: _Section) -> _Section:
    """The section without the paths of folders of classes: it is a class each that they are read by, and no suffix."""
    rest = copy.copy(section)
    for key in ("path", "validation_path", "test_path"):
        if is_of_classes(getattr(rest, key)):
            setattr(rest, key, None)
    return rest


def image_path_problem(named: str) -> str | None:
    """A table of pixels is asked for, or a folder that has a folder of images a class."""
    path = Path(named).expanduser()
    if path.is_file() or len(class_folders(path)) > 1:
        return None
    wanted = "name a folder that has a folder of images for each of two classes at least"
    if path.is_dir():
        return f"data.path={named} has {len(class_folders(path))} folders of files in it: {wanted}"
    return f"data.path={named} is no file: {wanted}, or a .csv or .csv.gz of pixels and a label"


def architecture_facts(section: ModelConfig) -> dict[str, object]:
    """The config.json of ``model.path``, else the YAML's architecture; {} where neither is at hand."""
    if not section.path:
        return dict(section.architecture)
    path = Path(section.path).expanduser()
    try:
        facts = json.loads((path if path.is_file() else path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # loading says better what is wrong with it
    return facts if isinstance(facts, dict) else {}


def _renaming(file: Path, suffixes: tuple[str, ...]) -> str:
    return f": if {file.name} is plain text, rename it to {file.stem}.txt" if ".txt" in suffixes else ""
