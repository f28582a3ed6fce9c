"""The Hydra edge: compose, convert once to dataclasses, run, and say plainly what went wrong."""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lora_exp import composing, following
from lora_exp.checks import check
from lora_exp.config import Config, conf_folder
from lora_exp.credentials import CredentialError, adopt_login, redacted, refuse_in_arguments
from lora_exp.errors import RefusedError, UserError
from lora_exp.job import (
    RESULT_FILE,
    SWEEP_FILE,
    AnyResult,
    Job,
    Outcome,
    filed,
    parse_outcome,
    read_swept,
    write_begun,
    write_outcome,
)
from lora_exp.listed import job_values
from lora_exp.machine import claims, launch, signals
from lora_exp.machine.allocator import keep_freed_memory
from lora_exp.machine.waiting import wait_briefly
from lora_exp.method_file import with_method
from lora_exp.quoting import texts_quoted
from lora_exp.rerunning import saved_config_composed
from lora_exp.schema import register, to_config
from lora_exp.sweep.callback import begun, limits
from lora_exp.task import tasks
from lora_exp.tracking.provenance import versions

log = logging.getLogger("lora_exp")
register()
wait_briefly()  # here, as a launcher's worker imports this module too, and before torch
keep_freed_memory()


class JobError(CompactHydraException):
    """One clear message: Hydra prints these without a traceback."""


@hydra.main(version_base="1.3", config_path=str(conf_folder()), config_name="config")
def hydra_main(composed: DictConfig) -> float:
    """One Hydra job. Returns what a sweeper can minimise: validation loss, or a plan's GiB."""
    with signals.noted(), signals.between_steps():
        signals.obey()
        if launch.is_launched() and launch.current() is None:
            raise JobError("Several processes share each job's work here: leave hydra/launcher at basic")
        job = _job(composed)
        try:
            with claims.claimed(job.folder, "hydra.sweep.dir" if job.sweep_folder else "hydra.run.dir"):
                return _finished(job, composed)
        except claims.FolderInUseError as error:  # no word of it into a folder that is another's
            raise JobError(str(error)) from error


def main() -> None:
    """``python -m lora_exp`` and the console script ``lora-exp``."""
    if "--version" in sys.argv[1:]:
        if not launch.follows():
            print(versions())
        return
    signals.install()
    launched, code = launch.begin(), 1
    try:
        if launched is not None and not launched.leads:
            following.follow(launched)
        _command()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    finally:
        if launched is not None and launched.leads:
            launched.end(code)


def _command() -> None:
    """What the command line asks for."""
    try:
        refuse_in_arguments(sys.argv[1:])
    except CredentialError as error:
        sys.exit(str(error))
    adopt_login()
    try:
        typed = texts_quoted(sys.argv[1:])
        with signals.at_once(), composing.plainly(), saved_config_composed(typed) as arguments:
            sys.argv[1:] = composing.in_order(arguments)
            composing.check_arguments(sys.argv[1:])
            with composing.printed_without_logins(sys.argv[1:]):
                hydra_main()
    except signals.Stopped:
        sys.stderr.write("Interrupted: what was finished is kept.\n")
        raise
    finally:
        try:
            with signals.while_closing():
                _report_sweeps(signals.received() is not None)
        finally:
            claims.release_all()
            signals.over()


def _finished(job: Job, composed: DictConfig) -> float:
    """The job's objective, once its end is written down, whatever that is."""
    values: dict[str, object] = {}
    earlier = _taken(job.folder / RESULT_FILE)  # of an earlier job, which this one replaces
    write_begun(job)
    try:
        composing.check_composed(composed)
        config = to_config(composed)
        values = job_values(config, job)
        check(config)
        result = _run(config, replace(job, earlier=_parsed(earlier)))
    except BaseException as error:
        with signals.while_closing():
            stop = signals.stop_behind(error)
            if stop is not None or not isinstance(error, Exception):
                _finish(job, values, "KILLED", error=str(stop or type(error).__name__))
                raise stop or error from None
            message = _explain(error, job)
            if isinstance(error, RefusedError) and earlier:
                (job.folder / RESULT_FILE).write_text(earlier)
                raise JobError(message) from error
            _finish(job, values, "FAILED", error=message)
            if job.sweep_folder is not None:
                log.error(message)
            raise JobError(message) from error
    with signals.while_closing():
        _finish(job, values, "FINISHED", result=result)
    return result.objective


def _taken(file: Path) -> str | None:
    """What a file held, which is then gone."""
    text = file.read_text() if file.is_file() else None
    file.unlink(missing_ok=True)
    return text


def _parsed(earlier: str | None) -> Outcome | None:
    """How the earlier job ended; None for a file that is none of ours, or damaged."""
    with contextlib.suppress(ValueError, LookupError, TypeError):
        return parse_outcome(earlier) if earlier else None
    return None


def _run(config: Config, job: Job) -> AnyResult:
    # torch, transformers and mlflow only when there is something to run. Their imports make a million objects that
    # stay: looking through them for garbage meanwhile took a tenth of the start. A run switches it on again.
    gc.disable()
    try:
        return tasks[config.task]().run(config, job)
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
        return OmegaConf.to_yaml(with_method(composed), resolve=True)
    except (OmegaConfBaseException, UserError):  # the conversion to dataclasses, inside the job, says what is wrong
        return OmegaConf.to_yaml(composed)


def _finish(
    job: Job,
    values: dict[str, object],
    status: str,
    result: AnyResult | None = None,
    error: str | None = None,
) -> None:
    try:
        write_outcome(job.folder, Outcome(job.number, status, job.overrides, values, result, error))
    except OSError as problem:
        sys.stderr.write(f"The job's result could not be written to {job.folder} ({problem.strerror})\n")


def _explain(error: Exception, job: Job) -> str:
    """The message for a person. What we raise ourselves is one already; the rest is named, its traceback filed."""
    message = redacted(str(error))
    if _says_full(error):
        reason = message.splitlines()[0]
        return f"The disk is full ({reason}): make room{_kept(job)}"
    if isinstance(error, UserError) and message and not getattr(error, "trace", None):
        return message
    if isinstance(error, OSError) and error.strerror:
        where = f" ({error.filename})" if error.filename else ""
        return f"{error.strerror}{where}: free or mend it{_kept(job)}"
    said = message if isinstance(error, UserError) and message else f"{type(error).__name__}: {message}"
    return said + filed(job.folder, getattr(error, "trace", None) or traceback.format_exc())


def _kept(job: Job) -> str:
    """What an error has left of the job, if anything."""
    adapter = job.folder / "adapter"
    return f"; what was trained so far is in {adapter}" if adapter.is_dir() else ""


def _says_full(error: Exception) -> bool:
    """Every library has its own error for it; the system's words are in all of them."""
    is_full = isinstance(error, OSError) and error.errno == errno.ENOSPC
    return is_full or any(words in str(error) for words in (os.strerror(errno.ENOSPC), "disk is full"))


def _report_sweeps(interrupted: bool) -> None:
    failed = False
    while begun:
        folder = begun.pop()
        if not any(folder.glob("**/result.json")) and not (folder / SWEEP_FILE).exists():
            continue
        try:
            from lora_exp.sweep.report import report_sweep
            from lora_exp.sweep.stopped import said_if_stopped

            failed |= not report_sweep(folder, interrupted)
            if folder in limits and not interrupted and (said := said_if_stopped(folder, limits.pop(folder))):
                sys.stderr.write(f"{said}\n")
        except Exception as error:
            sys.stderr.write(f"The sweep in {folder} could not be summed up: {redacted(str(error))}\n")
            failed = True
    if failed and sys.exc_info()[0] is None and os.environ.get("HYDRA_FULL_ERROR") != "1":
        sys.exit(1)


if __name__ == "__main__":
    main()
