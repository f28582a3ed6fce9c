"""Which jobs share what: in this order nothing is loaded twice. Imports nothing heavy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from lora_exp.config import Config


def group_of(config: Config) -> str:
    """What jobs must have in common to train over one frozen base, on the same rows, at once."""
    sections = (config.model, config.quantization, config.data, config.machine)
    shared = [asdict(section) for section in sections]
    seed = config.seed if config.data.new_head else None  # a new head is drawn, and belongs to the base
    return json.dumps([shared, config.device, config.adapter.is_added, seed], sort_keys=True, default=str)


def in_order(groups: Sequence[str | None]) -> list[list[int]]:
    """The places of jobs, those of one group together, groups by their first job. One without a group is alone."""
    found: dict[object, list[int]] = {}
    for place, group in enumerate(groups):
        found.setdefault(place if group is None else group, []).append(place)
    return list(found.values())
