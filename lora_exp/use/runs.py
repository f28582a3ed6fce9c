"""Finished runs, by what a person calls them: a folder, an MLflow run's id, ``best``. Needs no torch."""

from __future__ import annotations

import re
from pathlib import Path

from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.use.best import find_best
from lora_exp.use.found import SAVED, FoundRun, base_named, check_tracked, checkpoint_folder, is_saved, said
from lora_exp.use_config import BestConfig

__all__ = ["BEST", "FoundRun", "base_named", "checkpoint_folder", "find_run", "names_of", "said"]

BEST = "best"
PROVENANCE = "provenance.json"  # what an export's folder has
_RUN_ID = re.compile(r"[0-9a-f]{32}")
_STEP = re.compile(r"step_(\d{8,})")  # a checkpoint's folder


def names_of(run: object) -> list[str]:
    """What ``run`` names: nothing, one, or a list."""
    if run is None:
        return []
    return [str(name) for name in run] if isinstance(run, (list, tuple)) else [str(run)]


def find_run(name: str, best: BestConfig, tracking: TrackingConfig) -> FoundRun:
    """The run that a person calls ``name``. Raises UserError where there is none, or it has saved nothing."""
    if name == BEST:
        return find_best(best, tracking)
    if (folder := Path(name).expanduser()).is_dir():
        return _in_folder(folder.resolve(), name)
    if _RUN_ID.fullmatch(name):
        return _of_id(name, tracking)
    raise UserError(
        f"run={name} is neither a folder, nor the id of an MLflow run (32 of 0-9 and a-f), nor best: "
        "such as run=outputs/runs/DATE/TIME"
    )


def find_export(name: str) -> FoundRun:
    """An export, as ``adapter``, by its folder. Raises UserError for anything else."""
    folder = Path(name).expanduser()
    if not (folder / PROVENANCE).is_file():
        raise UserError(f"run={name} is no export (it has no {PROVENANCE}): name a folder that task=export wrote")
    return FoundRun(folder.resolve())


def _in_folder(folder: Path, name: str) -> FoundRun:
    if (folder / PROVENANCE).is_file() and not (folder / SAVED[0]).is_file():
        raise UserError(
            f"run={name} is an export of a whole model, and no run: use it as a base by model.path={name}, or name its "
            f"run (it stands in {PROVENANCE})"
        )
    if (found := _STEP.fullmatch(folder.name)) and is_saved(folder.parents[1] / "adapter"):
        return FoundRun(folder.parents[1] / "adapter", folder.parents[1], int(found[1]))
    if folder.name == "adapter" and is_saved(folder) and (folder.parent / "config.yaml").is_file():
        return FoundRun(folder, folder.parent)
    if is_saved(folder):
        return FoundRun(folder)
    if (folder / "config.yaml").is_file():
        if not is_saved(folder / "adapter"):
            raise UserError(f"run={name} has saved no adapter yet: name a run whose training came to an evaluation")
        return FoundRun(folder / "adapter", folder)
    if any(folder.glob("*/result.json")):
        raise UserError(f"run={name} is a sweep's folder: name one of its jobs ({name}/0), or run=best best.of={name}")
    raise UserError(f"run={name} holds neither a run (config.yaml, adapter/) nor an adapter ({SAVED[0]})")


def _of_id(run_id: str, section: TrackingConfig) -> FoundRun:
    from lora_exp.tracking import finished

    check_tracked(section, f"run={run_id}")
    return _in_folder(finished.local_folder(section, run_id), run_id)
