"""A config as the short names and plain values that a run is listed and compared by."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, fields

from lora_exp.config import Config, DataConfig, QuantizationConfig, resolve_alpha, scale_of
from lora_exp.job import Job
from lora_exp.use_config import SECTIONS

KNOBS = ("rank", "alpha", "scale", "dropout", "bias", "start")  # of the factors: without them they have no meaning
_UNLISTED = ("tracking", "sweep", "study", *SECTIONS)
_TRAINS = {"head": "modules_to_save", "full": "weights"}  # what the name of an adapter says already
_QUIET = ("test_fraction", "max_bad_fraction", "sample_seed")  # not listed where nobody has set them


def flat_values(config: Config) -> dict[str, object]:
    """The config as short names and plain values: what a run is listed and compared by.

    A group stands under its own name (``model``, ``adapter``, …), its other fields as ``group.field``.
    """
    sections = asdict(config)
    values = {key: value for key, value in sections.items() if not isinstance(value, dict)}
    for key, value in sections.items():
        if isinstance(value, dict):
            values |= _flat_section(key, value)
    del values["resume"]
    if config.parallel == "auto":
        del values["parallel"]
    if not config.plugins:
        del values["plugins"]
    if config.run is None:
        del values["run"]
    del values["suite"]  # where it lies; what it says is listed
    if config.suite_experiment is None:
        del values["suite_experiment"]
    if not config.adapter.has_factors:  # LoRA's knobs have no meaning there, and would group unlike runs
        return {key: value for key, value in values.items() if key not in KNOBS}
    with contextlib.suppress(ValueError, ZeroDivisionError):  # a config that check() refuses is listed as it is
        values |= {"alpha": resolve_alpha(config.alpha, config.rank), "scale": scale_of(config)}
    return values


def job_values(config: Config, job: Job) -> dict[str, object]:
    """``flat_values``, and of groups that the config has no section of (``+where=mlp``, ``+experiment=…``) the choice,
    where the sweep goes through several."""
    sections = {each.name for each in fields(config)}
    chosen = {key: job.choices[key] for key in job.swept if key in job.choices and key not in sections}
    return chosen | flat_values(config)


def _flat_section(group: str, section: dict[str, object]) -> dict[str, object]:
    if group in _UNLISTED:
        return {}
    if group == "prune" and section["pruner"] is None:
        return {}
    if group == "machine":
        return {f"machine.{name}": value for name, value in section.items() if value != "auto"}
    if group == "plan":
        return {"plan.gpu_gib": section["gpu_gib"]} if section["gpu_gib"] else {}
    title = "label" if section.get("label") else "name"
    values = {group: section[title]} if title in section else {}
    if group == "adapter":  # a choice that says no more than its name
        said = "adapter", _TRAINS.get(str(section["name"]))
        section = {name: value for name, value in section.items() if name != "trains" or value not in said}
        options = section["options"]
        if section["variant"] is None and isinstance(options, dict):  # of PEFT's: a swept one is a value like others
            section |= {"options": None} | {f"options.{name}": value for name, value in options.items()}
        section |= {key: None for key in ("variant", "method") if str(section[key]).lower() == section["name"]}
    if group == "layer" and section["types"] == [section["name"]]:
        return {group: section["name"]}
    if group == "data":
        section = {
            name: value for name, value in section.items() if name not in _QUIET or value != getattr(DataConfig, name)
        }
    if group == "train":
        section = {name: value for name, value in section.items() if name != "test" or not value}
    if group == "quantization":  # what is at its default is left out, as none has no use for it
        section = {name: value for name, value in section.items() if value != getattr(QuantizationConfig, name, None)}
    skipped = {title, "kind", "packaged", "cache_dir", "targets", "architecture"}
    rest = {f"{group}.{name}": value for name, value in section.items() if name not in skipped}
    return values | {key: value for key, value in rest.items() if value not in (None, {}, [])}
