"""Jobs of a sweep whose process ended without a word: nobody else would ever say how they ended."""

from __future__ import annotations

import contextlib
from pathlib import Path

import yaml

from lora_exp.job import RESULT_FILE, Outcome, write_outcome
from lora_exp.machine.claims import owner


def note_lost(folder: Path) -> int:
    """Write an outcome for each such job below ``folder``. Returns how many there were."""
    begun = [settings.parent for settings in sorted(folder.glob("**/.hydra")) if settings.parent != folder]
    lost = [job for job in begun if not (job / RESULT_FILE).exists() and _is_gone(job)]
    for job in lost:
        number = int(job.name) if job.name.isdigit() else 0
        error = "its process ended without a word: by kill -9, for want of memory, or so"
        with contextlib.suppress(OSError):
            write_outcome(job, Outcome(number, "KILLED", _overrides(job), {}, None, error))
    return len(lost)


def _is_gone(job: Path) -> bool:
    process = owner(job)
    return process is not None and process.is_gone()


def _overrides(job: Path) -> list[str]:
    try:
        return [str(override) for override in yaml.safe_load((job / ".hydra/overrides.yaml").read_text())]
    except (OSError, yaml.YAMLError, TypeError):
        return []
