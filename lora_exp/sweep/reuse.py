"""Never the same work twice: a job that has finished before is not run, and one that was interrupted goes on.

The job itself asks, wherever a launcher has put it. What makes two jobs the same is ``lora_exp.identity``.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.identity import JobIdentity, identity_here
from lora_exp.job import IDENTITY_FILE, Job, Outcome, Result, read_metrics, read_outcome, write_outcome
from lora_exp.listed import job_values
from lora_exp.machine import signals
from lora_exp.machine.saving import weights_sha256
from lora_exp.resuming import AUTO, can_go_on
from lora_exp.sweep import known
from lora_exp.sweep.standing_in import stand_in
from lora_exp.tracking import finished
from lora_exp.tracking.client import TrackingError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Earlier:
    """A job that has finished: its ``folder`` (a copy of it, of one from another machine) and what it found."""

    folder: Path
    result: Result

    @property
    def place(self) -> str:
        """The folder as a person knows it."""
        here = Path.cwd()
        return str(self.folder.relative_to(here)) if self.folder.is_relative_to(here) else str(self.folder)


def done_once(config: Config, job: Job, run: Callable[[Config], Result]) -> Result:
    """The job's result: that of one with the same identity, else what ``run`` makes of the config that it is given.

    Of two processes that have the same job one runs it, and the other waits for what comes of it.
    """
    with signals.at_once():
        identity = _identity(config)
    if identity is None:
        return run(config)
    with known.claimed(identity.digest, waits=_reuses(config, job)):
        if not _reuses(config, job):
            result = _noted(config, job, identity, run)
        elif (earlier := finished_before(config, job, identity)) is not None:
            log.info(f"job    reused from {earlier.place}, with the same identity {identity.digest[:12]}")
            result = stand_in(config, job, identity, earlier.folder, earlier.result)
            known.note(identity.digest, job.folder)
        else:
            result = _noted(interrupted_before(config, job, identity), job, identity, run)
        with contextlib.suppress(OSError):  # whoever waits for the job reads it; a full disk is said when it has ended
            write_outcome(job.folder, Outcome(job.number, "FINISHED", job.overrides, job_values(config, job), result))
    return result


def finished_before(config: Config, job: Job, identity: JobIdentity) -> Earlier | None:
    """A job of this identity that has finished and is whole: in the job's own folder, below ``outputs/``, in MLflow.

    Raises TrackingError for a server that cannot be reached.
    """
    own = job.earlier.result if job.earlier is not None and job.earlier.status == "FINISHED" else None
    if isinstance(own, Result) and _is_whole(job.folder, own, identity):
        return Earlier(job.folder.resolve(), own)
    for folder in known.folders(identity.digest):
        if (found := _result_in(folder)) is not None and _is_whole(folder, found, identity):
            return Earlier(folder, found)
    for folder in _tracked(config, identity):
        if (found := _result_in(folder)) is not None and _is_whole(folder, found, identity):
            return Earlier(folder, found)
    return None


def interrupted_before(config: Config, job: Job, identity: JobIdentity) -> Config:
    """The config, told to go on with a job of this identity that did not come to its end, if there is one."""
    found = []
    for folder in dict.fromkeys([job.folder.resolve(), *known.folders(identity.digest)]):
        if (checkpoint := can_go_on(folder, config)) is not None and _is_tracked_here(config, checkpoint.facts):
            found.append((checkpoint.step, folder))
    if not found:
        return config
    folder = max(found, key=lambda each: each[0])[1]
    return replace(config, resume=AUTO if folder == job.folder.resolve() else str(folder))


def _is_tracked_here(config: Config, facts: Mapping[str, Any]) -> bool:
    """Whether the run that a checkpoint is of can be gone on with: not where MLflow has forgotten it, or is another."""
    run_id = facts.get("run_id")
    if not run_id or not config.tracking.enabled or finished.has_run(config.tracking, str(run_id)):
        return True
    log.info(f"job    not gone on with, as MLflow has no run {run_id}: it is run anew")
    return False


def _identity(config: Config) -> JobIdentity | None:
    """None where it cannot be told before the run, which says better what is missing."""
    try:
        return identity_here(config)
    except (UserError, OSError) as error:
        log.debug("the job's identity is not known: %s", error)
        return None


def _reuses(config: Config, job: Job) -> bool:
    """Whether the config asks for it. Who names a run to go on with wants that, and nothing else."""
    asked = job.sweep_folder is not None if config.sweep.reuse is None else config.sweep.reuse
    return asked and config.resume in (None, AUTO)


def _noted(config: Config, job: Job, identity: JobIdentity, run: Callable[[Config], Result]) -> Result:
    known.note(identity.digest, job.folder)
    result = run(config)
    if result.identity not in ("", identity.digest):  # the base has come newly from the hub
        known.note(result.identity, job.folder)
    return result


def _result_in(folder: Path) -> Result | None:
    """What a finished job's folder says, or a copy of what MLflow has of one."""
    try:
        outcome = read_outcome(folder)
        if outcome is None and (folder / finished.RUN_ID_FILE).is_file():
            return _parsed(json.loads((folder / IDENTITY_FILE).read_text(encoding="utf-8"))["result"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    is_over = outcome is not None and outcome.status == "FINISHED"
    return outcome.result if is_over and isinstance(outcome.result, Result) else None  # type: ignore[union-attr]


def _parsed(raw: dict[str, Any]) -> Result:
    names = {each.name for each in fields(Result)}
    return Result(**{key: value for key, value in raw.items() if key in names})


def _is_whole(folder: Path, result: Result, identity: JobIdentity) -> bool:
    if result.identity != identity.digest or getattr(result, "pruned_at", None) is not None:
        return False
    try:
        is_saved = bool(result.adapter_sha256) and weights_sha256(folder / "adapter") == result.adapter_sha256
        problem = None if is_saved else "its adapter is gone or damaged"
        if problem is None and not any("eval/loss" in record for record in read_metrics(folder)):
            problem = "its metrics are gone"
    except (OSError, ValueError) as error:
        problem = str(error)
    if problem is not None:
        log.info(f"job    not reused from {folder}: {problem}")
    return problem is None


def _tracked(config: Config, identity: JobIdentity) -> Iterator[Path]:
    """The folders of finished runs that MLflow has with this identity, fetched where they are another machine's."""
    if not config.tracking.enabled:
        return
    for run_id, folder in finished.same_jobs(config.tracking, identity.digest):
        try:
            yield folder or finished.local_folder(config.tracking, run_id)
        except TrackingError:
            raise
        except UserError as error:
            log.info(f"job    not reused from MLflow's run {run_id}: {error}")
