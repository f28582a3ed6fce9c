"""Experiments in the form of PEFT's ``method_comparison``: what their files say, as values of our config.

A suite's folder holds ``experiments/METHOD/NAME/adapter_config.json`` with a ``training_params.json`` or none beside
it, and ``default_training_params.json``, which fills what that leaves out. An experiment without an adapter trains all
of the base's weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lora_exp.errors import UserError
from lora_exp.method_file import FILE, read_method

DEFAULTS, OWN = "default_training_params.json", "training_params.json"
_OPTIMIZER = ("lr", "weight_decay", "betas", "eps")  # what of optimizer_kwargs there is here
_TORCH_DECAY = 0.01  # of torch.optim.AdamW, by which a suite's own file that names none trains
_UNKNOWN = {"use_amp": False, "autocast_adapter_dtype": True, "init_kv_cache_prefix": None}  # what alone is done here


def register() -> None:
    """Let config files read a suite: ``${lora_exp.suite:SUITE,EXPERIMENT,KEY}`` and ``${lora_exp.suite_names:SUITE}``.

    Values that are not there are null; what is wrong with a suite is said by ``suite_problems``.
    """
    OmegaConf.register_new_resolver("lora_exp.suite", _value, replace=True)
    OmegaConf.register_new_resolver("lora_exp.suite_names", _names, replace=True)


def suite_problems(composed: DictConfig) -> list[str]:
    """What is wrong with the suite that a composed config reads, or with the experiment that it has chosen.

    A sweep has chosen none yet: one that cannot be done here ends its own job, and the others run.
    """
    if "suite_experiment" not in (OmegaConf.select(composed, "hydra.sweeper.params") or {}):
        return []
    if composed.suite is None:
        return ["suite is not set: add suite=FOLDER, a folder in the form of PEFT's method_comparison/MetaMathQA"]
    names = experiments(composed.suite)
    if not names:
        return [f"suite={composed.suite} has no experiments/METHOD/NAME/{FILE}: name a folder in PEFT's form"]
    chosen = composed.suite_experiment
    return _problems(composed.suite, chosen, names) if chosen else []


def experiments(suite: str) -> list[str]:
    """The names of a suite's experiments, METHOD/NAME."""
    root = _root(suite)
    files = [*root.glob(f"*/*/{FILE}"), *root.glob(f"*/*/{OWN}")]
    return sorted({"/".join(file.parts[-3:-1]) for file in files})


def training_params(suite: str, experiment: str) -> dict[str, Any]:
    """What the suite's defaults and the experiment's own file say, one over the other. Raises UserError."""
    root = _root(suite)
    places = [root / DEFAULTS, root.parent / DEFAULTS, root / experiment / OWN]
    found: dict[str, Any] = {}
    for file in places:
        found |= _read(file) if file.is_file() else {}
    return found


def _root(suite: str) -> Path:
    folder = Path(suite).expanduser()
    return folder / "experiments" if (folder / "experiments").is_dir() else folder


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): it must be JSON, as PEFT's suite has it") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} is no JSON object: it must be one, as PEFT's suite has it")
    return found


def _names(suite: str | None) -> str:
    """For Hydra's sweeper, which takes the names apart at commas."""
    return ",".join(f"'{name}'" for name in experiments(suite)) if suite else ""


def _value(suite: str | None, experiment: str | None, key: str, default: Any = None) -> Any:
    if not suite or not experiment:
        return default
    try:
        found = _values(suite, experiment)
    except UserError:  # said by suite_problems
        return default
    value = found.get(key)
    return default if value is None else value


def _values(suite: str, experiment: str) -> dict[str, Any]:
    """By the names that ``conf/experiment/peft_suite.yaml`` asks for."""
    given, folder = training_params(suite, experiment), _root(suite) / experiment
    optimizer, has_adapter = given.get("optimizer_kwargs", {}), (folder / FILE).is_file()
    method = read_method(str(folder))[0] if has_adapter else None
    return given | {
        "name": method.lower() if method else "full",
        "config": str((folder / FILE).resolve()) if has_adapter else None,
        "trains": "adapter" if has_adapter else "weights",
        "backend": "peft" if has_adapter else "native",
        "lr": optimizer.get("lr"),
        "weight_decay": optimizer.get("weight_decay", _TORCH_DECAY),
        "betas": optimizer.get("betas"),
        "eps": optimizer.get("eps"),
        "schedule": given["lr_scheduler"] or "constant" if "lr_scheduler" in given else None,
        "max_grad_norm": given.get("grad_norm_clip") or (float("inf") if "grad_norm_clip" in given else None),
        "dtype": given.get("dtype") if given.get("dtype") not in ("int8", "int4") else None,
    }


def _problems(suite: str, name: str, names: list[str]) -> list[str]:
    if name not in names:
        return [f"suite_experiment={name} is not in suite={suite}: choose one of {', '.join(names)}"]
    place = f"suite_experiment={name}"
    try:
        given, _ = training_params(suite, name), _values(suite, name)
    except UserError as error:
        return [f"{place}: {error}"]
    return [f"{place}: {problem}" for problem in _refused(given)]


def _refused(given: Mapping[str, Any]) -> list[str]:
    """What a suite asks of its own loop that is not done here."""
    found = []
    if given.get("optimizer_type", "AdamW") != "AdamW":
        found.append(f"optimizer_type={given['optimizer_type']} is not here: AdamW is")
    more = [name for name in given.get("optimizer_kwargs", {}) if name not in _OPTIMIZER]
    if more:
        found.append(f"optimizer_kwargs has {', '.join(more)}, which is not here: {', '.join(_OPTIMIZER)} are")
    for name, only in _UNKNOWN.items():
        if given.get(name, only) != only:
            found.append(f"{name}={json.dumps(given[name])} is not here: {json.dumps(only)} is")
    if given.get("dtype") in ("int8", "int4"):
        found.append(
            f"dtype={given['dtype']} is a quantised base: leave it out there, and add quantization=int8 or fp4"
        )
    return found
