"""Jobs as Ray's tasks. hydra-ray-launcher (2023) needs an older cloudpickle and boto3, and waits for nobody's end."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

from hydra_plugins.lora_exp_launchers._gathered import failed

log = logging.getLogger(__name__)
_LOOK_EVERY_S = 0.5


class TaskLauncher(Launcher):
    """``init``: what ``ray.init`` is told, if Ray is not there yet; ``remote``: what ``ray.remote`` is told a job."""

    def __init__(self, init: Mapping[str, Any], remote: Mapping[str, Any]) -> None:
        self._init, self._remote = _plain(init), _plain(remote)

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)
        if not ray.is_initialized():
            ray.init(**self._init)
        folder = Path(str(self._config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        log.info(f"{len(job_overrides)} jobs by Ray into {folder}")
        given = ray.put((self._context, self._task, self._config, Singleton.get_state(), _environment()))
        task = ray.remote(**{"max_retries": 0, **self._remote})(_run)
        begun = []
        for number, overrides in enumerate(job_overrides, start=initial_job_idx):
            log.info(f"\t#{number} : {' '.join(filter_overrides(overrides))}")
            begun.append(task.remote(given, list(overrides), number))
        left = list(begun)
        while left:  # short waits, between which signals are noted
            _, left = ray.wait(left, num_returns=len(left), timeout=_LOOK_EVERY_S)
        return [_return(reference, overrides) for reference, overrides in zip(begun, job_overrides, strict=True)]


def _run(given: tuple[Any, ...], overrides: list[str], number: int) -> JobReturn:
    """One job, in a process of Ray's."""
    context, task, config, state, environment = given
    os.environ.update(environment)
    os.chdir(config.hydra.runtime.cwd)
    setup_globals()
    Singleton.set_state(state)
    composed = context.config_loader.load_sweep_config(config, overrides)
    with open_dict(composed):
        composed.hydra.job.id, composed.hydra.job.num = ray.get_runtime_context().get_task_id(), number
    return run_job(
        hydra_context=context,
        task_function=task,
        config=composed,
        job_dir_key="hydra.sweep.dir",
        job_subdir_key="hydra.sweep.subdir",
    )


def _return(reference: ray.ObjectRef[JobReturn], overrides: Sequence[str]) -> JobReturn:
    try:
        found: JobReturn = ray.get(reference)
        return found
    except ray.exceptions.RayError as error:  # its process died
        return failed(overrides, error)


def _environment() -> dict[str, str]:
    """What a job reads of it: where MLflow is, where the cache lies, how this machine multiplies."""
    return {name: value for name, value in os.environ.items() if name.startswith(("LORA_EXP_", "MLFLOW_", "HF_"))}


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    found = OmegaConf.to_container(settings, resolve=True) if OmegaConf.is_config(settings) else dict(settings)
    assert isinstance(found, dict)
    return {str(name): value for name, value in found.items()}
