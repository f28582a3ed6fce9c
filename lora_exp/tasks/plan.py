"""``task=plan``: will it fit? No weights are loaded, nothing is trained."""

from __future__ import annotations

from lora_exp.config import Config
from lora_exp.job import Job, PlanResult
from lora_exp.machine import signals
from lora_exp.task import Task, task


@task("plan")
class Plan(Task):
    result = PlanResult

    def run(self, config: Config, job: Job) -> PlanResult:
        with signals.at_once():
            from lora_exp.plan.run import run_plan

        return run_plan(config, job)
