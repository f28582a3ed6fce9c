"""``task=evaluate``: what base, adapters and merged models find on a dataset, in one table."""

from __future__ import annotations

from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.data.split import SPLITS
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task

ALL = "all"


@task("evaluate")
class Evaluate(Task):
    result = UseResult
    of_runs = True
    reads_data = True

    def problems(self, config: Config) -> list[str]:
        section, found = config.evaluate, []
        if section.split not in SPLITS:
            found.append(f"evaluate.split={section.split} is not known: choose one of {', '.join(SPLITS)}")
        rows = section.rows
        if rows not in (None, ALL) and (isinstance(rows, bool) or not isinstance(rows, int) or rows < 1):
            found.append(f"evaluate.rows={rows} is neither a number above 0 nor all: such as 32")
        if config.run is None and not section.base:
            found.append("evaluate.base=false leaves nothing to evaluate without a run: add run=… or leave it out")
        if config.run is None and kind_of(config.data).new_head:
            found.append(f"data={config.data.label} needs a head that only a run has trained: add run=FOLDER")
        return found

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.use.evaluating import evaluate

        return evaluate(config, job)
