"""What every run is recorded with, whatever its task: its name, parameters, tags and resolved config."""

from __future__ import annotations

from collections.abc import Mapping

from lora_exp.config import Config, flat_values, uses_factors
from lora_exp.credentials import redacted
from lora_exp.job import Job
from lora_exp.provenance import provenance_tags
from lora_exp.tracking import Run


def run_name(config: Config, job: Job) -> str:
    """A sweep's job by its number and overrides, a single run by what it trains."""
    if job.sweep_folder is not None:
        return f"{job.number}: {' '.join(job.overrides)}"[:200]
    rank = f" r{config.rank}" if uses_factors(config) else ""
    return f"{config.model.label} {config.adapter.name}{rank}"[:200]


def log_setup(tracked: Run, config: Config, job: Job, place: Mapping[str, str]) -> None:
    """Log the flat values with ``place`` (dtype and device), the provenance, and the resolved YAML."""
    tracked.log_params(flat_values(config) | dict(place))
    groups = {f"choice.{group}": choice for group, choice in job.choices.items()}
    tracked.log_tags({**provenance_tags(), **groups, "overrides": " ".join(job.overrides), "folder": str(job.folder)})
    resolved = job.folder / "config.yaml"
    resolved.write_text(redacted(job.config_yaml))
    overrides = job.folder / "overrides.txt"
    overrides.write_text(redacted("\n".join(job.overrides)) + "\n")
    for file in (resolved, overrides):
        tracked.log_artifact(file)
