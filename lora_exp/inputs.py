"""The files that a config names, looked at but not read: what can be said of them before anything heavy is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from lora_exp.config import ModelConfig

TEXT_SUFFIXES = (".txt", ".md", ".jsonl")
_LISTED = ", ".join(TEXT_SUFFIXES)
_CONVERSIONS = {
    ".json": "print(*map(json.dumps, json.load(open({old!r}))), sep='\\n')",
    ".csv": "print(*map(json.dumps, csv.DictReader(open({old!r}))), sep='\\n')",
    ".tsv": "print(*map(json.dumps, csv.DictReader(open({old!r}), delimiter='\\t')), sep='\\n')",
}


def model_path_problem(named: str, may_be_file: bool = False) -> str | None:
    """A folder in hub layout is asked for; a plan is content with a config.json."""
    path = Path(named).expanduser()
    if (path / "config.json").is_file() or (may_be_file and path.is_file()):
        return None
    if not path.exists():
        return f"model.path={named} has no config.json, as it does not exist: name a folder in hub layout"
    what = "a config.json or a folder in hub layout" if may_be_file else "a folder in hub layout"
    return f"model.path={named} has no config.json: name {what}"


def text_path_problem(named: str) -> str | None:
    """A text file, or a folder that holds one, is asked for."""
    path = Path(named).expanduser()
    if not path.exists():
        return f"data.path={named} does not exist: name a file or a folder"
    if path.is_dir():
        files, skipped = text_files(path)
        others = f", but {len(skipped)} others: {_conversion(skipped[0])}" if skipped else ""
        return None if files else f"data.path={named} holds no {_LISTED} file{others}"
    if path.suffix.lower() not in TEXT_SUFFIXES:
        return f"data.path={named} is none of the kinds that are read as text ({_LISTED}): {_conversion(path)}"
    return None


def image_path_problem(named: str) -> str | None:
    """One table of pixels is asked for."""
    if Path(named).expanduser().is_file():
        return None
    return f"data.path={named} is no file: name a .csv or .csv.gz of pixels and a label"


def text_files(path: Path) -> tuple[list[Path], list[Path]]:
    """The text files of a folder in order, and its other files but hidden ones; of a file, itself."""
    if path.is_file():
        return [path], []
    files = sorted(file for file in path.rglob("*") if file.is_file())
    found = [file for file in files if file.suffix.lower() in TEXT_SUFFIXES]
    others = [file for file in files if file.suffix.lower() not in TEXT_SUFFIXES]
    return found, [file for file in others if not file.name.startswith(".")]


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


def _conversion(file: Path) -> str:
    code = _CONVERSIONS.get(file.suffix.lower())
    if code is None:
        return f"if {file.name} is plain text, rename it to {file.stem}.txt"
    line = f'python -c "import csv, json; {code.format(old=str(file))}" > {file.with_suffix(".jsonl")}'
    return f"make JSON Lines of it ({line}) and name its field by data.text_field"
