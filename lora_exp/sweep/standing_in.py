"""A result that stands in a new sweep: the files of the job that found it, and a run of its own in MLflow."""

from __future__ import annotations

import functools
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from lora_exp.config import Config
from lora_exp.identity import JobIdentity
from lora_exp.job import IDENTITY_FILE, IDENTITY_TAG, RESULT_FILE, TRACEBACK_FILE, Job, Result, read_metrics
from lora_exp.machine.saving import replace_folder
from lora_exp.recording import log_files, metrics_of
from lora_exp.results import log_result
from lora_exp.resuming import can_go_on, clear
from lora_exp.tracking import finished
from lora_exp.tracking import mlflow as tracking
from lora_exp.tracking.setup import log_setup, run_name, sweep_name
from lora_exp.training.checkpoints import FOLDER, Checkpoints
from lora_exp.training.loop import Record

# What each job writes for itself; the rest of its folder's files is what it found.
_OWN = ("config.yaml", "overrides.txt", RESULT_FILE, IDENTITY_FILE, TRACEBACK_FILE, "begun.json", "run_id", ".log")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def stand_in(config: Config, job: Job, identity: JobIdentity, folder: Path, result: Result) -> Result:
    """Have the job's folder and its run in MLflow hold what the job in ``folder`` found. Returns it as the job's own.

    Nothing is done where that is the job's own folder, whose run is there. Raises RefusedError where the folder holds
    another run that was interrupted.
    """
    is_own = folder == job.folder.resolve()
    if is_own and (not config.tracking.enabled or _known(config, result.run_id)):
        return result
    if not is_own:
        _take_files(config, job, folder)
    origin = result.reused_from or result.run_id or str(folder)
    names = run_name(config, job), job.sweep_folder, sweep_name(config, job)
    with tracking.open_run(config.tracking, *names, folder=job.folder) as tracked:
        result = replace(result, adapter=str(job.folder / "adapter"), run_id=tracked.run_id, reused_from=origin)
        identity.write(job.folder, asdict(result))
        products = identity.parts["products"]
        log_setup(tracked, config, job, {name: products[name] for name in ("dtype", "device")})
        tracked.log_tags({IDENTITY_TAG: identity.digest, finished.REUSED_TAG: origin})
        records = read_metrics(job.folder)
        if (source := _known(config, origin)) is not None:
            _tell_evaluations(tracked, records)
            tracked.stand_in(source)
        else:
            _tell_all(tracked, job, result, records)
    return result


def _known(config: Config, run_id: str | None) -> str | None:
    """The run, if MLflow has it."""
    is_known = (
        config.tracking.enabled
        and run_id is not None
        and _RUN_ID.fullmatch(run_id) is not None
        and finished.has_run(config.tracking, run_id)
    )
    return run_id if is_known else None


def _take_files(config: Config, job: Job, folder: Path) -> None:
    """What is large is on the disk once: nothing writes into these files, which are only replaced."""
    if can_go_on(job.folder, config) is None:
        clear(Checkpoints(job.folder / FOLDER), job)
    for name in ("adapter", FOLDER):
        if (folder / name).is_dir():
            take = functools.partial(shutil.copytree, folder / name, copy_function=_linked)
            replace_folder(job.folder / name, take)
    for file in folder.iterdir():
        if file.is_file() and not file.name.startswith(".") and not file.name.endswith(_OWN):
            shutil.copyfile(file, job.folder / file.name)


def _linked(source: str, target: str) -> str:
    try:
        os.link(source, target)
    except OSError:  # another disk, or a file system without links
        shutil.copyfile(source, target)
    return target


def _tell_evaluations(tracked: tracking.Run, records: Sequence[Record]) -> None:
    """The curves of what was found; each of the other metrics comes, by its last value, from the run that found it."""
    for record in records:
        found = {name: value for name, value in metrics_of(record).items() if name.startswith(("eval/", "written/"))}
        if found:
            tracked.log_metrics(found, step=int(record["step"]))


def _tell_all(tracked: tracking.Run, job: Job, result: Result, records: list[Record]) -> None:
    """Of a job that this MLflow never knew."""
    for record in records:
        tracked.log_metrics(metrics_of(record), step=int(record["step"]))
    share = 100 * result.trainable / result.total
    counts: dict[str, float] = {"trainable": result.trainable, "total": result.total, "trainable_percent": share}
    sizes = {} if result.base_weight_bytes is None else {"base_weight_bytes": result.base_weight_bytes}
    tracked.log_metrics({f"params/{name}": value for name, value in counts.items()} | sizes, step=0)
    log_files(tracked, job, records)
    digests = {"adapter_sha256": result.adapter_sha256, "data_fingerprint": result.data_fingerprint}
    log_result(tracked, result, records, digests)
