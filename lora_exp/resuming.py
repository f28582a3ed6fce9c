"""What ``resume`` means: which run is gone on with, from which of its checkpoints, and whether that is the same run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lora_exp.adapters.numerics.precision import Answers
from lora_exp.config import Config, MachineConfig
from lora_exp.determining import settings
from lora_exp.errors import RefusedError, UserError
from lora_exp.job import METRICS_FILE, Job
from lora_exp.keeping import VALUES_FILE
from lora_exp.machine import claims
from lora_exp.machine.distributed import World
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.provenance import library_versions
from lora_exp.training.checkpoints import FOLDER, Checkpoint, Checkpoints, read

log = logging.getLogger(__name__)
AUTO = "auto"


@dataclass(frozen=True)
class Resumed:
    """The run to go on with: its files in ``folder``, and the checkpoint that was chosen; None: to begin anew."""

    folder: Path
    checkpoint: Checkpoint | None = None

    @property
    def goes_on(self) -> bool:
        return self.checkpoint is not None

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the checkpoint says beside its state."""
        return {} if self.checkpoint is None else self.checkpoint.facts

    def run_id(self, config: Config) -> str | None:
        """The MLflow run to go on with, if any."""
        known = self.facts.get("run_id")
        return str(known) if known and config.tracking.enabled else None

    def machine(self, section: MachineConfig) -> MachineConfig:
        """With the answers that the run began with, where the config leaves them to be measured: its bits need them."""
        known = self.facts.get("machine", {})
        return replace(section, **{name: answer for name, answer in known.items() if getattr(section, name) == "auto"})

    def take_up(self, folder: Path) -> None:
        """Have ``folder`` hold what the run had when the checkpoint was written, and none of what came after."""
        if self.checkpoint is None:
            return
        length = int(self.facts["metrics"]["bytes"])
        if folder.resolve() == self.folder.resolve():
            os.truncate(folder / METRICS_FILE, length)
            Checkpoints(folder / FOLDER).forget_after(self.checkpoint.step)
            return
        (folder / METRICS_FILE).write_bytes((self.folder / METRICS_FILE).read_bytes()[:length])
        if (self.folder / VALUES_FILE).is_file():
            shutil.copy(self.folder / VALUES_FILE, folder / VALUES_FILE)
        if (self.folder / "adapter").is_dir():
            shutil.copytree(self.folder / "adapter", folder / "adapter", dirs_exist_ok=True)


class Identity:
    """What two halves of one run must have in common; ``facts`` of it go into every checkpoint."""

    def __init__(self, config: Config, resumed: Resumed, answers: Answers) -> None:
        self.facts: dict[str, Any] = {"config": settings(config), "versions": library_versions()}
        self.facts["machine"] = asdict(answers)
        self._before = resumed.facts
        if resumed.goes_on:
            _compare_versions(self._before["versions"], self.facts["versions"])

    def note(self, name: str, value: str) -> None:
        """Add what was found out since. Raises UserError where the run that is gone on with had something else."""
        self.facts[name] = value
        before = self._before.get(name, value)
        if before != value:
            raise UserError(
                f"resume: {name} is not what the run began with ({before[:12]} → {value[:12]}): bring back what it "
                "had, or begin anew in another folder without resume"
            )


@contextlib.contextmanager
def resumed_run(config: Config, job: Job) -> Iterator[Resumed]:
    """What ``resume`` names, which is this process's for a block.

    Raises RefusedError where it names nothing that can be gone on from, or a run with another config.
    """
    folder = job.folder if config.resume in (None, AUTO) else _named(config)
    if config.resume is None or folder.resolve() != job.folder.resolve():
        clear(Checkpoints(job.folder / FOLDER), job)
    if config.resume is None:
        yield Resumed(folder)
        return
    with claims.claimed(folder, "resume"):
        found = Checkpoints(folder / FOLDER).newest(lambda checkpoint: _metrics_problem(checkpoint, folder))
        if found is None and config.resume != AUTO:
            raise RefusedError(f"resume={config.resume}: {folder} holds no checkpoint: begin anew, without resume")
        if found is not None:
            _check_settings(found.facts["config"], settings(config), folder)
            log.info(f"resume {folder} from optimizer step {found.step}")
        yield Resumed(folder, found)


def can_go_on(folder: Path, config: Config) -> Checkpoint | None:
    """The checkpoint that a run with ``config`` could go on from in ``folder``, if nobody is at work there."""
    if claims.is_in_use(folder):
        return None
    try:
        found = Checkpoints(folder / FOLDER).newest(lambda checkpoint: _metrics_problem(checkpoint, folder))
    except RefusedError as error:
        log.warning(str(error))
        return None
    return found if found is not None and found.facts.get("config") == settings(config) else None


@contextlib.contextmanager
def resumed_together(config: Config, job: Job, world: World) -> Iterator[Resumed]:
    """The same, found by the process that leads; the others read the checkpoint that it has chosen."""
    if world.leads:
        with resumed_run(config, job) as found:
            chosen = None if found.checkpoint is None else str(found.checkpoint.folder)
            world.tell("resumed", chosen)
            yield found
        return
    chosen = world.told("resumed")
    yield Resumed(job.folder) if chosen is None else Resumed(Path(chosen).parents[1], read(Path(chosen)))


def _named(config: Config) -> Path:
    """The folder of the run that ``resume`` names."""
    name = str(config.resume)
    if (folder := Path(name).expanduser()).is_dir():
        return folder
    if not re.fullmatch(r"[0-9a-f]{32}", name):
        raise RefusedError(
            f"resume={name} is neither a run's folder nor the id of an MLflow run (32 of 0-9 and a-f): "
            "to go on in hydra.run.dir, give resume=auto"
        )
    if not config.tracking.enabled:
        raise RefusedError(
            f"resume={name} is an MLflow run's id, which tracking=none cannot look up: give resume=FOLDER"
        )
    folder = tracking.folder_of(config.tracking, name)
    if not folder.is_dir():
        raise RefusedError(f"resume={name}: the run's folder {folder} is not here: give where it is now, resume=FOLDER")
    return folder


def clear(checkpoints: Checkpoints, job: Job) -> None:
    """Remove a finished run's checkpoints from a folder that is used again; an unfinished one's are worth hours."""
    steps = checkpoints.steps()
    if steps and not checkpoints.is_over():
        key = "hydra.sweep.dir" if job.sweep_folder else "hydra.run.dir"
        raise RefusedError(
            f"{job.folder} holds a run that stopped after optimizer step {steps[-1]}: go on with it by resume=auto, "
            f"choose another folder with {key}=FOLDER, or remove {checkpoints.folder}"
        )
    checkpoints.forget_after(-1)


def _metrics_problem(checkpoint: Checkpoint, folder: Path) -> str | None:
    """Why what the run had recorded by then is not in its file of metrics any more; None if it is."""
    known = checkpoint.facts["metrics"]
    try:
        begun = (folder / METRICS_FILE).read_bytes()[: known["bytes"]]
    except OSError as error:
        return f"{METRICS_FILE}: {error.strerror}"
    return None if hashlib.sha256(begun).hexdigest() == known["sha256"] else f"{METRICS_FILE} is not what was written"


def _check_settings(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    absent = "(not set)"
    pairs = {key: (before.get(key, absent), now.get(key, absent)) for key in sorted({*before, *now})}
    differing = [f"{key}: {old} → {new}" for key, (old, new) in pairs.items() if old != new]
    if differing:
        raise RefusedError(
            "resume: this is not the config that the run began with:\n"
            + "".join(f"  - {each}\n" for each in differing)
            + f"Give the overrides that it had ({folder / 'overrides.txt'}), or begin anew without resume"
        )


def _compare_versions(before: Mapping[str, str], now: Mapping[str, str]) -> None:
    pairs = [(name, before.get(name), now.get(name)) for name in sorted({*before, *now})]
    if changed := [f"{name} {old} → {new}" for name, old, new in pairs if old != new]:
        log.warning(f"resume with other versions than the run began with ({', '.join(changed)}): its bits may differ")
