"""The Hydra edge: compose, convert once to dataclasses, run, and say plainly what went wrong."""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp import composing
from lora_exp.checks import check
from lora_exp.config import Config, conf_folder, flat_values, register, to_config
from lora_exp.job import Job, Outcome, PlanResult, Result, read_swept, write_outcome
from lora_exp.machine.waiting import wait_briefly
from lora_exp.provenance import redacted, versions
from lora_exp.sweep.callback import begun

log = logging.getLogger("lora_exp")
register()
wait_briefly()  # here, as a launcher's worker imports this module too, and before torch


class JobError(CompactHydraException):
    """One clear message: Hydra prints these without a traceback."""


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def hydra_main(composed: DictConfig) -> float:
    """One Hydra job. Returns what a sweeper can minimise: validation loss, or a plan's GiB."""
    job = _job(composed)
    values: dict[str, Any] = {}
    try:
        composing.check_composed(composed)
        config = to_config(composed)
        values = flat_values(config)
        check(config)
        result = _run(config, job)
    except Exception as error:
        message = _explain(error, job)
        _finish(job, values, "FAILED", error=message)
        if job.sweep_folder is not None:
            log.error(message)
        raise JobError(message) from error
    except BaseException as error:  # SIGINT, SIGTERM
        _finish(job, values, "KILLED", error=type(error).__name__)
        raise
    _finish(job, values, "FINISHED", result=result)
    return result.objective


def main() -> None:
    """``python -m lora_exp`` and the console script ``lora-exp``."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    interrupted = False
    if "--version" in sys.argv[1:]:
        print(versions())
        return
    try:
        with composing.plainly():
            composing.check_arguments(sys.argv[1:])
            hydra_main()
    except SystemExit as end:
        interrupted = end.code == 128 + signal.SIGTERM
        raise
    except KeyboardInterrupt:
        interrupted = True
        sys.stderr.write("Interrupted: what was finished is kept.\n")
        sys.exit(128 + signal.SIGINT)
    finally:
        _report_sweeps(interrupted)


def _run(config: Config, job: Job) -> Result | PlanResult:
    # torch, transformers and mlflow only when there is something to run. Their imports make a million objects that
    # stay: looking through them for garbage meanwhile took a tenth of the start. A run switches it on again.
    gc.disable()
    try:
        if config.task == "plan":
            from lora_exp.plan.run import run_plan

            return run_plan(config, job)
        from lora_exp.run import run

        return run(config, job)
    finally:
        gc.enable()


def _job(composed: DictConfig) -> Job:
    settings = HydraConfig.get()
    multirun = settings.mode == RunMode.MULTIRUN
    return Job(
        folder=Path(settings.runtime.output_dir),
        number=int(settings.job.num) if multirun else 0,
        overrides=list(settings.overrides.task),
        choices={group: str(choice) for group, choice in settings.runtime.choices.items() if "/" not in group},
        config_yaml=_yaml(composed),
        sweep_folder=Path(settings.sweep.dir).resolve() if multirun else None,
        swept=read_swept(Path(settings.sweep.dir)) if multirun else (),
    )


def _yaml(composed: DictConfig) -> str:
    try:
        return OmegaConf.to_yaml(composed, resolve=True)
    except OmegaConfBaseException:  # the conversion to dataclasses, inside the job, says what is wrong
        return OmegaConf.to_yaml(composed)


def _finish(
    job: Job, values: dict[str, Any], status: str, result: Result | PlanResult | None = None, error: str | None = None
) -> None:
    try:
        write_outcome(job.folder, Outcome(job.number, status, job.overrides, values, result, error))
    except OSError as problem:
        sys.stderr.write(f"The job's result could not be written to {job.folder} ({problem.strerror})\n")


def _explain(error: Exception, job: Job) -> str:
    """The message for a person. What we raise ourselves is one already; the rest is named, its traceback filed."""
    message = redacted(str(error))
    if isinstance(error, ValueError) and message:
        return message + (_kept(job) if type(error).__name__ == "TrackingError" else "")
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}: free or mend it{_kept(job)}"
    try:
        (job.folder / "traceback.txt").write_text(redacted(traceback.format_exc()))
    except OSError:
        return f"{type(error).__name__}: {message}"
    return f"{type(error).__name__}: {message}\nThe traceback is in {job.folder / 'traceback.txt'}"


def _kept(job: Job) -> str:
    """What an error has left of the job, if anything."""
    adapter = job.folder / "adapter"
    return f"; what was trained so far is in {adapter}" if adapter.is_dir() else ""


def _report_sweeps(interrupted: bool) -> None:
    failed = False
    while begun:
        folder = begun.pop()
        if not any(folder.glob("**/result.json")):
            continue
        try:
            from lora_exp.sweep.report import report_sweep

            failed |= not report_sweep(folder, interrupted)
        except Exception as error:
            sys.stderr.write(f"The sweep in {folder} could not be summed up: {redacted(str(error))}\n")
            failed = True
    if failed and sys.exc_info()[0] is None and os.environ.get("HYDRA_FULL_ERROR") != "1":
        sys.exit(1)


if __name__ == "__main__":
    main()
