"""What a run says and keeps of its data: how many, what is left out of them, an example, and where they are from."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.config import DataConfig
from lora_exp.data.sources import held_out_fractions, sources_of
from lora_exp.data.split import SPLITS
from lora_exp.machine.cache import file_sha256

if TYPE_CHECKING:
    from lora_exp.data.kind import Data
    from lora_exp.tracking.mlflow import Run

log = logging.getLogger(__name__)
_DIGEST = 16  # MLflow takes 36 characters
_Origin = tuple[object, dict[str, object]]  # what changes with the content, and where it comes from
_NAMES = {"train": "training", "validation": "validation", "test": "test"}
_DIMMED = re.compile(r"\x1b\[2m(.*?)\x1b\[(?:0|22)m", re.DOTALL)


def record_data(tracked: Run, section: DataConfig, data: Data) -> None:
    """Say what was read and hand it to tracking: a dataset a split, and the fingerprint as a tag."""
    rows = {"train": data.train, "validation": data.validation, "test": data.test}
    counts = {split: len(each) for split, each in rows.items() if each is not None}  # type: ignore[arg-type]
    for facts in data_facts(section, counts, data.fingerprint):
        tracked.log_dataset(facts)
    if data.fingerprint:
        tracked.log_tags({"data_fingerprint": data.fingerprint})
    *others, last = (f"{count:,} {_NAMES[split]}" for split, count in counts.items())
    log.info(f"data   {section.label}: {', '.join(others)} and {last} {data.rows}")
    for line in data.said:
        log.info(f"data   {line}")
    if data.example:
        _show(data.example)


def data_facts(section: DataConfig, rows: Mapping[str, int], fingerprint: str) -> list[dict[str, str]]:
    """A dataset a split as MLflow lists it: its name, the hash of its content, where that comes from, how many rows
    it has, and what it is for (``context``)."""
    origins = _shared_origin(section, rows, fingerprint)
    if getattr(section, "suffixes", ()) and (section.path is not None or section.name or section.packaged):
        origins = _origins(section)
    found = []
    for split, count in rows.items():
        identity, source = origins[split]
        kind = "package" if "package" in source else "hub" if "dataset" in source else "local"
        facts = {"name": section.label, "digest": _hash(identity), "source_type": kind, "source": json.dumps(source)}
        found.append({**facts, "profile": json.dumps({"rows": count}), "context": _NAMES[split]})
    return found


def _shared_origin(section: DataConfig, rows: Mapping[str, int], fingerprint: str) -> dict[str, _Origin]:
    """Of a kind that finds its data by itself."""
    identity = fingerprint or [_own_files(section), section.val_fraction, section.test_fraction]
    return {split: ([identity, split], _source(section, "train")) for split in rows}


def _origins(section: DataConfig) -> dict[str, _Origin]:
    sources = {split: sources_of(section, split) for split in SPLITS}
    fractions = dict(zip(SPLITS[1:], held_out_fractions(section, sources), strict=True))
    found: dict[str, _Origin] = {}
    for split in SPLITS:
        home = split if sources[split] else "train"
        identity, source = [each.identity() for each in sources[home]], _source(section, home)
        if home == "train":
            source |= {f"held out for {name}": share for name, share in fractions.items() if share}
            identity.append([split, fractions])
        found[split] = identity, source
    return found


def _source(section: DataConfig, split: str) -> dict[str, object]:
    prefix = "" if split == "train" else f"{split}_"
    if (path := getattr(section, f"{prefix}path")) is not None:
        return {"path": path}
    if section.name:
        named = {"subset": section.subset, "revision": section.revision}
        named |= {"split": getattr(section, f"{prefix}split") or "train"}
        return {"dataset": section.name, **{key: value for key, value in named.items() if value}}
    if packaged := section.packaged:
        return {"package": f"{packaged.distribution}=={packaged.version}", "file": packaged.file}
    return {}


def _own_files(section: DataConfig) -> object:
    path = Path(section.path).expanduser() if isinstance(section.path, str) else None
    if path is None or not path.exists():
        return section.packaged.sha256 if section.packaged else section.label
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return [(file.name if file == path else str(file.relative_to(path)), file_sha256(file)) for file in files]


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:_DIGEST]


def _show(example: str) -> None:
    """On a terminal dimmed where it is dimmed; elsewhere such parts stand between ‹ and ›."""
    if sys.stdout.isatty():
        sys.stdout.write(f"row    {example}\n")
    else:
        log.info("row    " + _DIMMED.sub(r"‹\1›", example))
