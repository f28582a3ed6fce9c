"""Where an export came from, and what it is made of: its ``provenance.json``, in which no secret may stand."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from lora_exp.adapters import LoraModel
from lora_exp.adapters.files.safetensors import read_json
from lora_exp.adapters.files.whole import write_text
from lora_exp.credentials import redacted
from lora_exp.errors import UserError
from lora_exp.machine.cache import file_sha256
from lora_exp.tracking.provenance import library_versions
from lora_exp.use.runs import PROVENANCE

if TYPE_CHECKING:
    from lora_exp.export.format import Wish

Facts = dict[str, Any]


def facts_of(wish: Wish, config_yaml: str) -> Facts:
    """What is known before anything is written. Hashes are named as in the run's tags and on the adapter's card."""
    trained, run = wish.trained, wish.trained.runs[wish.name]
    result, config = run.result, trained.config
    return {
        "format": wish.section.format,
        "run_id": run.run_id,
        "run": str(run.place),
        "optimizer_step": run.at_step,
        "metrics": _metrics(wish),
        "base_model": base_name(wish),
        "revision": config.model.revision,
        "base_files_sha256": trained.digest,
        "base_values_sha256": trained.model.base_sha256() if isinstance(trained.model, LoraModel) else None,
        "adapter_sha256": adapter_sha256(run.adapter),
        "data": config.data.label,
        "data_fingerprint": result.data_fingerprint if result is not None else None,
        "computed_in": str(trained.place.dtype).removeprefix("torch."),
        "quantization": asdict(config.quantization),
        "export": asdict(wish.section),
        "versions": {**library_versions(), "python": platform.python_version()},
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config": yaml.safe_load(config_yaml),
    }


def adapter_sha256(folder: Path) -> str:
    """SHA-256 of the file that holds what was trained; of several, each."""
    return ",".join(file_sha256(file) for file in sorted(folder.glob("*.safetensors")))


def base_name(wish: Wish) -> str | None:
    """The base's name on the hub; the path that a user gave."""
    model = wish.trained.config.model
    return model.path or model.name


def write_provenance(folder: Path, facts: Mapping[str, Any]) -> None:
    """With the hash of every file in ``folder``."""
    whole = {**facts, "files": {name: file_sha256(folder / name) for name in files_in(folder)}}
    write_text(folder / PROVENANCE, redacted(json.dumps(whole, indent=2)) + "\n")


def read_provenance(folder: Path) -> Facts:
    """Raises UserError for a folder that is no export."""
    file = folder / PROVENANCE
    if not file.is_file():
        raise UserError(f"{folder} is no export, as it has no {PROVENANCE}: name a folder that task=export wrote")
    found: Facts = read_json(file.read_text(encoding="utf-8", errors="replace"), str(file))
    if not isinstance(found.get("files"), dict) or "format" not in found:
        raise UserError(f"{file} is not what task=export wrote: copy the export anew")
    return found


def files_in(folder: Path) -> list[str]:
    """All files but the provenance itself, by their paths inside."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(set(found) - {PROVENANCE})


def damage(folder: Path, facts: Facts) -> list[str]:
    """What is not as it was written: each file that is changed or missing."""
    found = []
    for name, digest in facts["files"].items():
        if not (folder / name).is_file():
            found.append(f"{name} is missing")
        elif file_sha256(folder / name) != digest:
            found.append(f"{name} was changed")
    return found


def _metrics(wish: Wish) -> dict[str, float]:
    """What the run's own evaluation found of the exported adapter."""
    run = wish.trained.runs[wish.name]
    result = run.result
    if result is None:
        return {}
    if run.step is not None:
        return {"eval/loss": result.best_loss} if run.step == result.best_step and result.best_loss else {}
    tests = {f"test/{name}": value for name, value in result.test.items()}
    return {"eval/loss": result.eval_loss, **{f"eval/{k}": v for k, v in result.metrics.items()}, **tests}
