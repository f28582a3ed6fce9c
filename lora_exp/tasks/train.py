"""``task=train``: one job from config to result."""

from __future__ import annotations

from lora_exp import following
from lora_exp.config import Config
from lora_exp.job import Job, Result
from lora_exp.machine import launch, signals
from lora_exp.task import Task, task


@task("train")
class Train(Task):
    result = Result
    trains = True

    def run(self, config: Config, job: Job) -> Result:
        with signals.at_once():
            from lora_exp.run import run

        if (launched := launch.current()) is not None:
            following.tell(launched, job)
        return run(config, job)
