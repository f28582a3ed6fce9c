"""``task=train``: one job from config to result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_exp import following
from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.job import Job, Outcome, Result, write_outcome
from lora_exp.listed import job_values
from lora_exp.machine import launch, signals
from lora_exp.task import Task, task
from lora_exp.tasks.export import export_problems


@task("train")
class Train(Task):
    result = Result
    trains = True

    def problems(self, config: Config) -> list[str]:
        return [] if config.tracking.register is None else export_problems(_registering(config, Path()))

    def run(self, config: Config, job: Job) -> Result:
        with signals.at_once():
            from lora_exp.sweep.reuse import done_once

        result = done_once(config, job, lambda settled: _trained(settled, job))
        if config.tracking.register is not None:
            _register(config, job, result)
        return result


def _trained(config: Config, job: Job) -> Result:
    with signals.at_once():
        from lora_exp.run import run

    if (launched := launch.current()) is not None:
        following.tell(launched, job)
    return run(config, job)


def _register(config: Config, job: Job, result: Result) -> None:
    """Raises UserError, with the command that does it later; what was trained is whole."""
    from lora_exp.export.run import run_export

    # An export reads what came of a run from its folder.
    write_outcome(job.folder, Outcome(job.number, "FINISHED", job.overrides, job_values(config, job), result))
    try:
        run_export(_registering(config, job.folder), job)
    except UserError as error:
        again = f"task=export run={job.folder} export=mlflow tracking.register={config.tracking.register}"
        raise UserError(
            f"{error}\nThe run is whole, but not registered. To do it later: python -m lora_exp {again} "
            "export.overwrite=true"
        ) from error


def _registering(config: Config, folder: Path) -> Config:
    """What makes an MLflow model of the run in ``folder``, in the place of what an earlier end of it left."""
    section = replace(config.export, format="mlflow", path=None, overwrite=True)
    return replace(config, task="export", run=str(folder), export=section)
