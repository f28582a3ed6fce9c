"""Hydra's side of the packed launcher: jobs are composed and run as Hydra's basic launcher does, but in groups."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict

log = logging.getLogger("lora_exp.packed")


class PackedLauncher(Launcher):
    """Runs a sweep's jobs in this process, those that share a base one after the other."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from lora_exp.packing.groups import in_order
        from lora_exp.packing.shelf import shared

        setup_globals()
        self._log_as_launcher()
        Path(str(self._config.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
        composed = [self._composed(list(given), initial_job_idx + i) for i, given in enumerate(job_overrides)]
        groups = in_order([_group_of(config) for config in composed])
        log.info(f"Launching {len(composed)} jobs in this process, in {len(groups)} group(s) that share a base")
        returns: dict[int, JobReturn] = {}
        with shared():
            for place in (place for group in groups for place in group):
                log.info(f"\t#{initial_job_idx + place} : {' '.join(filter_overrides(job_overrides[place]))}")
                returns[place] = self._run(composed[place])
        return [returns[place] for place in range(len(composed))]

    def _composed(self, overrides: list[str], number: int) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _run(self, config: DictConfig) -> JobReturn:
        found = run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )
        self._log_as_launcher()
        return found

    def _log_as_launcher(self) -> None:
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)


def _group_of(composed: DictConfig) -> str | None:
    """None for a config that is wrong, which the job says itself."""
    from lora_exp.packing.groups import group_of
    from lora_exp.schema import to_config

    try:
        plain = OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"])
        return group_of(to_config(cast(DictConfig, plain)))
    except Exception:
        return None
