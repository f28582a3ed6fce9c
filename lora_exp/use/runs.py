"""Finished runs, by what a person calls them: a folder, an MLflow run's id, ``best``. Needs no torch."""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.job import Outcome, Result, read_outcome
from lora_exp.training.metrics import higher_is_better
from lora_exp.use_config import BestConfig

log = logging.getLogger(__name__)
BEST = "best"
OUTPUTS = Path("outputs")
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_STEP = re.compile(r"step_(\d{8,})")  # a checkpoint's folder
# What a folder of trained weights has: an adapter in PEFT's format, chosen weights of the base, or all of them.
_SAVED = ("adapter_config.json", "weights.safetensors", "model.safetensors", "model.safetensors.index.json")


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
    def run_id(self) -> str | None:
        return self.result.run_id if self.result is not None else None

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
        return re.sub(r"[^\w-]+", "-", "-".join(parts)).strip("-") or "adapter"


def names_of(run: object) -> list[str]:
    """What ``run`` names: nothing, one, or a list."""
    if run is None:
        return []
    return [str(name) for name in run] if isinstance(run, (list, tuple)) else [str(run)]


def find_run(name: str, best: BestConfig, tracking: TrackingConfig) -> FoundRun:
    """The run that a person calls ``name``. Raises UserError where there is none, or it has saved nothing."""
    if name == BEST:
        return _best(best, tracking)
    if (folder := Path(name).expanduser()).is_dir():
        return _in_folder(folder.resolve(), name)
    if _RUN_ID.fullmatch(name):
        return _of_id(name, tracking)
    raise UserError(
        f"run={name} is neither a folder, nor the id of an MLflow run (32 of 0-9 and a-f), nor best: "
        "such as run=outputs/runs/DATE/TIME"
    )


def _in_folder(folder: Path, name: str) -> FoundRun:
    if (found := _STEP.fullmatch(folder.name)) and _is_saved(folder.parents[1] / "adapter"):
        return FoundRun(folder.parents[1] / "adapter", folder.parents[1], int(found[1]))
    if folder.name == "adapter" and _is_saved(folder) and (folder.parent / "config.yaml").is_file():
        return FoundRun(folder, folder.parent)
    if _is_saved(folder):
        return FoundRun(folder)
    if (folder / "config.yaml").is_file():
        if not _is_saved(folder / "adapter"):
            raise UserError(f"run={name} has saved no adapter yet: name a run whose training came to an evaluation")
        return FoundRun(folder / "adapter", folder)
    if any(folder.glob("*/result.json")):
        raise UserError(f"run={name} is a sweep's folder: name one of its jobs ({name}/0), or run=best best.of={name}")
    raise UserError(f"run={name} holds neither a run (config.yaml, adapter/) nor an adapter ({_SAVED[0]})")


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in _SAVED)


def _of_id(run_id: str, section: TrackingConfig) -> FoundRun:
    from lora_exp.tracking import finished

    _check_tracked(section, f"run={run_id}")
    return _in_folder(finished.local_folder(section, run_id), run_id)


def _check_tracked(section: TrackingConfig, what: str) -> None:
    if not section.enabled:
        raise UserError(f"{what} is looked up in MLflow, which tracking=none switches off: name a folder")


def _best(best: BestConfig, tracking: TrackingConfig) -> FoundRun:
    """The best by ``best.metric``; its best checkpoint where that is kept and better than what was saved."""
    folders, of = _candidates(best, tracking)
    lower = not (higher_is_better(best.metric) if best.better is None else best.better == "higher")
    scored = []
    for folder in folders:
        outcome = read_outcome(folder)
        if outcome is None or outcome.status != "FINISHED" or not isinstance(outcome.result, Result):
            continue
        value, step = _score(outcome.result, best.metric, folder)
        if value is not None and math.isfinite(value) and _is_saved(folder / "adapter"):
            scored.append((value if lower else -value, folder, step))
    if not scored:
        raise UserError(f"run=best: no finished training among {of} has {best.metric}: name another best.metric")
    _, folder, step = min(scored, key=lambda each: each[:2])
    return FoundRun((folder / "adapter").resolve(), folder.resolve(), step)


def _score(result: Result, metric: str, folder: Path) -> tuple[float | None, int | None]:
    """The run's value, and the step of the checkpoint that has it; None where that is what was saved."""
    name = metric.removeprefix("eval/")
    if name == "loss":
        step, loss = result.best_step, result.best_loss
        if step is None or loss is None or step == result.step or loss >= result.eval_loss:
            return result.eval_loss, None
        if checkpoint_folder(folder, step).is_dir():
            return loss, step
        return result.eval_loss, None
    if metric.startswith("test/"):
        return result.test.get(metric.removeprefix("test/")), None
    return result.metrics.get(name), None


def checkpoint_folder(folder: Path, step: int) -> Path:
    """Where a run in ``folder`` keeps the checkpoint of a step."""
    return folder / "checkpoints" / f"step_{step:08d}"


def _candidates(best: BestConfig, tracking: TrackingConfig) -> tuple[Sequence[Path], str]:
    """The folders that are looked at, and what they are in words."""
    if best.of is None:
        sweep = _newest_sweep()
        return _jobs(sweep), str(sweep)
    if (folder := Path(best.of).expanduser()).is_dir():
        return _jobs(folder), str(folder)
    from lora_exp.tracking import finished

    _check_tracked(tracking, f"best.of={best.of}")
    return finished.folders(tracking, best.of), f"MLflow's {best.of}"


def _jobs(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs; or of all jobs below."""
    found = sorted({file.parent for file in folder.glob("**/result.json")})
    if not found:
        raise UserError(f"best.of={folder} holds no job that has ended: name a sweep's folder")
    return found


def _newest_sweep() -> Path:
    sweeps = [file.parent for file in OUTPUTS.glob("sweeps/*/*/*/result.json")]
    if sweeps:
        return max((job.parent for job in sweeps), key=lambda sweep: sweep.stat().st_mtime)
    runs = sorted((OUTPUTS / "runs").glob("*/*/result.json"), key=lambda file: file.stat().st_mtime)
    hint = f"run={runs[-1].parent}" if runs else "run=FOLDER"
    raise UserError(f"run=best: there is no sweep below ./{OUTPUTS}: name a run ({hint}), or best.of=FOLDER")


def said(run: FoundRun) -> str:
    """Which run it is, in a line."""
    result = run.result
    if result is None:
        return f"run    {run.adapter}"
    best = run.step is not None and run.step == result.best_step
    loss, step = (result.best_loss, run.step) if best else (result.eval_loss, result.step)
    figure = "" if run.step is not None and not best else f", eval/loss {loss:.4f}"
    return f"run    {run.folder}{figure} at optimizer step {run.step if run.step is not None else step}"


def base_named(adapter: Path) -> str | None:
    """The base that an adapter in PEFT's format says it is for."""
    file = adapter / "adapter_config.json"
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    name = facts.get("base_model_name_or_path") if isinstance(facts, dict) else None
    return str(name) if name else None
