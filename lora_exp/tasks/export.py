"""``task=export``: a finished run's model in a format, verified."""

from __future__ import annotations

import importlib.util
import math
from typing import ClassVar

from lora_exp.config import Config
from lora_exp.export.format import formats
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.task import Task, task
from lora_exp.use.runs import names_of


@task("export")
class Export(Task):
    result = UseResult
    of_runs: ClassVar[bool] = True

    def problems(self, config: Config) -> list[str]:
        found = [] if names_of(config.run) else ["task=export is about a finished run: add run=FOLDER, or run=best"]
        return [*found, *export_problems(config)]

    def run(self, config: Config, job: Job) -> UseResult:
        with signals.at_once():
            from lora_exp.export.run import run_export

        return run_export(config, job)


def export_problems(config: Config) -> list[str]:
    """What can be seen to be wrong with the section ``export``."""
    section = config.export
    found = []
    for name, least in (("texts", 1), ("tokens", 2)):
        if getattr(section, name) < least:
            found.append(f"export.{name}={getattr(section, name)} is below {least}: 4 texts of 32 tokens are common")
    for name in ("max_logit", "max_kl"):
        value = getattr(section, name)
        if value is not None and not value >= 0:
            found.append(f"export.{name}={value} is not 0 or more: leave it out for the format's own")
    if not (section.shard_gb > 0 and math.isfinite(section.shard_gb)):
        found.append(f"export.shard_gb={section.shard_gb} must be above 0: 5 is common")
    if problem := formats.problem(section.format):
        return [*found, problem]
    kind = formats[section.format]()
    found += [*_missing(section.format, kind.needs, kind.extra), *kind.problems(config)]
    return [*found, *_register_problems(config, kind.registers)]


def _register_problems(config: Config, takes: bool) -> list[str]:
    name = config.tracking.register
    if name is None:
        return []
    if not config.tracking.enabled:
        return [f"tracking.register={name} needs MLflow, which tracking=none switches off: add tracking=mlflow"]
    if not name.strip() or "/" in name or ":" in name:
        return [f"tracking.register={name} is no name for MLflow's registry: use one without / and :"]
    return [] if takes else [f"tracking.register={name} is for MLflow models: use export=mlflow"]


def _missing(name: str, needs: tuple[str, ...], extra: str | None) -> list[str]:
    absent = [package for package in needs if importlib.util.find_spec(package) is None]
    how = f"lora_exp[{extra}]" if extra else " ".join(absent)
    return [f"export={name}: {' and '.join(absent)} not installed: pip install '{how}'"] if absent else []
