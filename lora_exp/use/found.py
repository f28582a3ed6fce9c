"""A finished run: where its files are, and what its training found. Needs no torch."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.job import Outcome, Result, read_metrics, read_outcome
from lora_exp.tracking.finished import RUN_ID_FILE

# What a folder of trained weights has: an adapter in PEFT's format, chosen weights of the base, or all of them.
SAVED = ("adapter_config.json", "weights.safetensors", "model.safetensors", "model.safetensors.index.json")


@dataclass(frozen=True)
class FoundRun:
    """``folder`` is the run's, with its config; None of an adapter that lies alone. ``adapter``: what it saved.

    ``step``: the optimizer step of the checkpoint whose values are meant; None: those that are saved.
    """

    adapter: Path
    folder: Path | None = None
    step: int | None = None

    @property
    def outcome(self) -> Outcome | None:
        return read_outcome(self.folder) if self.folder is not None else None

    @property
    def result(self) -> Result | None:
        """What its training found, if that is known."""
        found = self.outcome.result if self.outcome is not None else None
        return found if isinstance(found, Result) else None

    @property
    def config(self) -> Mapping[str, Any]:
        """Its resolved config, as it was saved; empty where there is none."""
        found = yaml.safe_load(_text(self.folder / "config.yaml")) if self.folder is not None else None
        return found if isinstance(found, dict) else {}

    @property
    def run_id(self) -> str | None:
        """Of its MLflow run, if it had one."""
        if self.result is not None:
            return self.result.run_id
        return (_text(self.folder / RUN_ID_FILE).strip() or None) if self.folder is not None else None

    @property
    def at_step(self) -> int | None:
        """The optimizer step whose values are meant, if that is known."""
        if self.step is not None:
            return self.step
        return self.result.step if self.result is not None else _saved_step(self.folder, self.config)

    @property
    def evaluation(self) -> Mapping[str, float]:
        """What its training found at that step: ``eval/loss`` and others."""
        return _evaluation(self.folder, self.at_step) if self.folder is not None else {}

    @property
    def title(self) -> str:
        """A name for tables: the folders that set it apart from others."""
        folder = self.folder or self.adapter
        title = "/".join(folder.parts[-3:] if folder.name.isdigit() else folder.parts[-2:])
        return title if self.step is None else f"{title} (step {self.step})"

    @property
    def place(self) -> Path:
        """A folder that names it: ``find_run`` finds the same again."""
        if self.folder is None or self.step is None:
            return self.folder or self.adapter
        return checkpoint_folder(self.folder, self.step)

    @property
    def slug(self) -> str:
        """A name for files and for an adapter of a model."""
        folder = self.folder or self.adapter
        parts = folder.parts[-3:] if folder.name.isdigit() else folder.parts[-2:]
        name = re.sub(r"[^\w-]+", "-", "-".join(parts)).strip("-") or "adapter"
        return name if self.step is None else f"{name}-step-{self.step}"


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where a run in ``folder`` keeps the checkpoint of a step."""
    return folder / "checkpoints" / f"step_{step:08d}"


def is_saved(folder: Path) -> bool:
    """Whether a folder holds something that was trained."""
    return any((folder / name).is_file() for name in SAVED)


def check_tracked(section: TrackingConfig, what: str) -> None:
    """Raise UserError if there is no MLflow to look ``what`` up in."""
    if not section.enabled:
        raise UserError(f"{what} is looked up in MLflow, which tracking=none switches off: name a folder")


def said(run: FoundRun) -> str:
    """Which run it is, in a line."""
    step, found = run.at_step, run.evaluation
    if run.folder is None or step is None:
        return f"run    {run.folder or run.adapter}"
    figure = f", eval/loss {found['eval/loss']:.4f}" if "eval/loss" in found else ""
    return f"run    {run.folder} after optimizer step {step}{figure}"


def base_named(adapter: Path) -> str | None:
    """The base that an adapter in PEFT's format says it is for."""
    file = adapter / "adapter_config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    return str(name) if name else None


def _saved_step(folder: Path | None, config: Mapping[str, Any]) -> int | None:
    """After which step what a run has saved was evaluated, as its records and its config tell."""
    records = [each for each in read_metrics(folder) if "eval/loss" in each and each["step"]] if folder else []
    if not records:
        return None
    train = config.get("train", {})
    keeps_best = train.get("keep") == "best" or (train.get("keep") is None and train.get("early_stopping") is not None)
    if not keeps_best:
        return int(records[-1]["step"])
    from lora_exp.training.best import Best
    from lora_exp.training.metrics import higher_is_better

    metric = str(train.get("best_metric", "eval/loss"))
    best = Best(metric, higher_is_better(metric))
    for record in records:
        best.note(record)
    return best.step


def _evaluation(folder: Path, step: int | None) -> Mapping[str, float]:
    records = [each for each in read_metrics(folder) if "eval/loss" in each and each["step"] == step]
    return records[-1] if records else {}


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8") if file.is_file() else ""
