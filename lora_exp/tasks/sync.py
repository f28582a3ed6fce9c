"""``task=sync``: deliver to MLflow what it lacks."""

from __future__ import annotations

from lora_exp.config import Config
from lora_exp.job import Job, SyncResult
from lora_exp.machine import signals
from lora_exp.task import Task, task


@task("sync")
class Sync(Task):
    result = SyncResult
    of_folder = True

    def problems(self, config: Config) -> list[str]:
        if config.run is None or isinstance(config.run, str):
            return []
        return [f"run={config.run} is of task=sync one folder: a run's or a sweep's"]

    def run(self, config: Config, job: Job) -> SyncResult:
        with signals.at_once():
            from lora_exp.tracking.sync import run_sync

        return run_sync(config)
