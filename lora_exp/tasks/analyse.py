"""``task=analyse``: what finished runs have changed in the base's weights, and at which rank it would have done."""

from __future__ import annotations

import math
from typing import ClassVar

from lora_exp.config import Config
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task
from lora_exp.tasks.evaluate import Evaluate
from lora_exp.use.runs import names_of


@task("analyse")
class Analyse(Task):
    result = UseResult
    of_runs: ClassVar[bool] = True

    def problems(self, config: Config) -> list[str]:
        section = config.analyse
        found = [] if names_of(config.run) else ["task=analyse is about finished runs: add run=FOLDER, or run=best"]
        if section.curve:
            found += Evaluate().problems(config)
        if section.ranks is not None and (not section.ranks or min(section.ranks) < 1):
            found.append(f"analyse.ranks={section.ranks} must be ranks of 1 and more: such as [1,2,4,8]")
        if not (section.margin >= 0 and math.isfinite(section.margin)):
            found.append(f"analyse.margin={section.margin} must be 0 or more nats: 0.01 is common")
        if section.top < 1:
            found.append(f"analyse.top={section.top} is below 1: 10 is common")
        if not 0 < section.similarity <= 1:
            found.append(f"analyse.similarity={section.similarity} is outside (0, 1]: 0.5 is common")
        return found

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.use.analysing.run import analyse

        return analyse(config, job)
