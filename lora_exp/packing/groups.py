"""Which jobs share what. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from lora_exp.config import Config


def group_of(config: Config) -> str:
    """What jobs that follow one another should have in common: then no base and no data is loaded twice."""
    sections = (config.model, config.quantization, config.data, config.machine)
    shared = [asdict(section) for section in sections]
    seed = config.seed if config.data.new_head else None  # a new head is drawn, and belongs to the base
    return json.dumps([shared, config.task, config.device, config.adapter.is_added, seed], sort_keys=True, default=str)


def lane_group_of(config: Config) -> str | None:
    """What jobs must have in common to be lanes of one pass; None for a job that is to be alone."""
    is_ours = (config.task, config.trainer, config.backend) == ("train", "native", "native")
    is_whole = config.adapter.is_added and config.bias == "none" and not config.model.modules_to_save
    if not (is_ours and is_whole) or config.data.new_head or config.parallel != "auto":
        return None
    return json.dumps([group_of(config), config.train.micro_batch_size, config.train.gradient_checkpointing])


def may_share_layers(configs: Sequence[Config | None]) -> bool:
    """Whether jobs of one group draw the same rows at each step, and name layers by number: then some may lie below
    the adapters of all."""
    known = [config for config in configs if config is not None]
    is_numbered = all(any(letter.isdigit() for letter in str(config.targets)) for config in known)
    return is_numbered and len({(config.seed, config.train.grad_accum_steps) for config in known}) == 1


def together(groups: Sequence[str | None]) -> list[list[int]]:
    """The places of jobs, those of one group together, groups by their first job. One without a group is alone."""
    found: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(place if group is None else group, []).append(place)
    return list(found.values())
