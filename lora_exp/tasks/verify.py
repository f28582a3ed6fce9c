"""``task=verify``: whether an export is still what was written, and still answers as its run's model did."""

from __future__ import annotations

from typing import ClassVar

from lora_exp.config import Config
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task
from lora_exp.use.runs import names_of


@task("verify")
class Verify(Task):
    result = UseResult
    of_exports: ClassVar[bool] = True

    def problems(self, config: Config) -> list[str]:
        return [] if names_of(config.run) else ["task=verify is about an export: add run=outputs/exports/NAME"]

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.export.again import run_verify

        return run_verify(config, job)
