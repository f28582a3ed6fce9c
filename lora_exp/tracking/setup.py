"""What every run is recorded with, whatever its task: its name, parameters, tags and resolved config."""

from __future__ import annotations

from collections.abc import Mapping

from lora_exp.config import Config
from lora_exp.credentials import redacted
from lora_exp.job import Job
from lora_exp.listed import job_values
from lora_exp.tracking.provenance import provenance_tags
from lora_exp.tracking.tracked import Run


def run_name(config: Config, job: Job) -> str:
    """A sweep's job by what sets it apart from the others, a single run by what it trains.

    ``tracking.run_name`` is a single run's name, and goes before what sets a sweep's job apart.
    """
    own = config.tracking.run_name
    apart = [override.lstrip("+") for override in job.overrides if _key(override) in job.swept]
    if job.sweep_folder is not None and apart:
        return " ".join([*([own] if own else []), *apart])[:200]
    if own:
        return own if job.sweep_folder is None else f"{own} {job.number}"
    rank = f" r{config.rank}" if config.adapter.has_factors else ""
    return f"{config.model.label} {config.adapter.name}{rank}"[:200]


def sweep_name(config: Config, job: Job) -> str | None:
    """The name of a sweep's parent run."""
    if config.tracking.run_name:
        return config.tracking.run_name
    return f"sweep over {', '.join(job.swept)}"[:200] if job.swept else None


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def log_setup(tracked: Run, config: Config, job: Job, place: Mapping[str, str]) -> None:
    """Log the flat values with ``place`` (dtype and device), the provenance, and the resolved YAML."""
    tracked.log_params(job_values(config, job) | dict(place))
    groups = {f"choice.{group}": choice for group, choice in job.choices.items()}
    tracked.log_tags({**provenance_tags(), **groups, "overrides": " ".join(job.overrides), "folder": str(job.folder)})
    resolved = job.folder / "config.yaml"
    resolved.write_text(redacted(job.config_yaml))
    overrides = job.folder / "overrides.txt"
    overrides.write_text(redacted("\n".join(job.overrides)) + "\n")
    for file in (resolved, overrides):
        tracked.log_artifact(file)
