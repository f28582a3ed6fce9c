"""The section ``study`` of a composed sweep: whether it can be followed, and its seeds among what is swept."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf, open_dict

from lora_exp.composing import swept_keys
from lora_exp.config import ConfigError

_BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"
_STUDY = "StudySweeper"


def check_study(composed: DictConfig) -> None:
    """Raise ConfigError where a sweep cannot do what ``study`` asks for."""
    swept, study = swept_keys(composed), composed.study
    target = str(composed.hydra.sweeper._target_)
    problems = [
        f"study.tune={key} is not swept: add its values, such as {key}=3e-4,1e-3,3e-3"
        for key in study.tune if key not in swept
    ] if target == _BASIC or target.endswith(_STUDY) else []  # fmt: skip
    if study.replicates is not None and "seed" in swept:
        problems.append(f"study.replicates={study.replicates} and seed are both there: leave one out")
    elif study.replicates is not None and target != _BASIC and not target.endswith(_STUDY):
        name = target.rpartition(".")[2]
        problems.append(f"study.replicates={study.replicates} is not for {name}, which chooses each job: leave it out")
    if problems:
        raise ConfigError(problems)


def repeat(composed: DictConfig) -> None:
    """Let the basic sweeper go through as many seeds as ``study.replicates`` says, from ``seed`` on."""
    replicates = composed.study.replicates
    if replicates is None or composed.hydra.sweeper._target_ != _BASIC:
        return
    seeds = ",".join(str(composed.seed + each) for each in range(replicates))
    OmegaConf.set_readonly(composed.hydra, False)
    with open_dict(composed.hydra):
        composed.hydra.sweeper.params = {**(composed.hydra.sweeper.params or {}), "seed": seeds}
        composed.hydra.overrides.task = [each for each in composed.hydra.overrides.task if not each.startswith("seed=")]
