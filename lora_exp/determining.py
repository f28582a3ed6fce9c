"""Which of a config's values say what a result is, and which only how it was asked for and where: the one place."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from lora_exp.config import Config
from lora_exp.credentials import redacted
from lora_exp.use_config import SECTIONS

OF_ONE_COMMAND = ("resume", "sweep", "study")  # how a command asks for a run; part of no run
OF_A_TASK = ("task", "run", *SECTIONS)  # what another task than training reads
# Where a run takes place and is tracked, how often it is saved, and whether it may be cut short.
WHERE_IT_RUNS = (
    "device", "machine", "plan", "prune", "tracking", "train.save_every", "train.keep_checkpoints", "data.cache_dir",
    "model.cache_dir",
)  # fmt: skip
_LEFT_OUT = (*OF_ONE_COMMAND, *OF_A_TASK, *WHERE_IT_RUNS)


def settings(config: Config) -> dict[str, Any]:
    """Every value of the config that a training's result may depend on, by dotted key, without a login in it."""
    plain = json.loads(redacted(json.dumps(asdict(config), default=str)))
    return {key: value for key, value in _dotted(plain, "").items() if not _is_left_out(key)}


def _is_left_out(key: str) -> bool:
    return any(key == each or key.startswith(f"{each}.") for each in _LEFT_OUT)


def _dotted(values: Mapping[str, Any], above: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            found |= _dotted(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = value
    return found
