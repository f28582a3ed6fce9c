"""Hydra's side of the packed launcher: jobs are composed and run as Hydra's basic launcher does it, but in groups."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, configure_log, filter_overrides, run_job, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

if TYPE_CHECKING:
    from lora_exp.config import Config
    from lora_exp.packing.launching import Wish

log = logging.getLogger("lora_exp.packed")
_FORMAT = "hydra.job_logging.formatters.terminal.format"


class PackedLauncher(Launcher):
    """Runs a sweep's jobs in this process, over one frozen base: ``lanes`` at once, or one after the other."""

    def __init__(self, lanes: int | str = "auto", passes: str = "auto", products: str = "auto") -> None:
        self._lanes, self._passes, self._products = lanes, passes, products

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._context, self._task, self._config = hydra_context, task_function, config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        from lora_exp.packing.launching import Wish, groups_of
        from lora_exp.packing.shelf import shared
        from lora_exp.sweep.live import launched

        wish = Wish.of(self._lanes, self._passes, self._products)
        setup_globals()
        self._log_as_launcher()
        folder = Path(str(self._config.hydra.sweep.dir)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        jobs = [self._composed(list(given), initial_job_idx + i) for i, given in enumerate(job_overrides)]
        configs = [_typed(job) for job in jobs]
        groups = groups_of(configs)
        log.info(f"Launching {len(jobs)} jobs in this process")
        found: dict[int, JobReturn] = {}
        trials = OmegaConf.select(self._config, "hydra.sweeper.n_trials")
        with launched(folder, job_overrides, initial_job_idx, trials, tells_jobs=False), shared():
            for places in groups:
                found |= self._run_group(places, jobs, configs, wish)
        return [found[place] for place in range(len(jobs))]

    def _run_group(
        self, places: list[int], jobs: list[DictConfig], configs: list[Config | None], wish: Wish
    ) -> dict[int, JobReturn]:
        from lora_exp.packing.groups import may_share_layers
        from lora_exp.packing.launching import most_lanes, run_lanes

        ours = [configs[place] for place in places]
        most = most_lanes(ours, wish)
        if most == 1:
            return {place: self._run(jobs[place]) for place in places}
        for place in places:
            _number_lines(jobs[place])
        work = [(str(jobs[place].hydra.job.num), partial(self._run, jobs[place])) for place in places]
        turns = run_lanes(work, most, wish, [_hydra_config], may_share_layers(ours))
        self._log_as_launcher()
        for turn in turns:
            if turn.error is not None:
                raise turn.error
        return {place: cast(JobReturn, turn.result) for place, turn in zip(places, turns, strict=True)}

    def _composed(self, overrides: list[str], number: int) -> DictConfig:
        config = self._context.config_loader.load_sweep_config(self._config, overrides)
        with open_dict(config):
            config.hydra.job.id = config.hydra.job.num = number
        return config

    def _run(self, job: DictConfig) -> JobReturn:
        self._log_as_launcher()
        overrides = filter_overrides([str(override) for override in job.hydra.overrides.task])
        log.info(f"\t#{job.hydra.job.num} : {' '.join(overrides)}")
        return run_job(
            hydra_context=self._context,
            task_function=self._task,
            config=job,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )

    def _log_as_launcher(self) -> None:
        configure_log(self._config.hydra.hydra_logging, self._config.hydra.verbose)


def _typed(composed: DictConfig) -> Config | None:
    """None for a config that is wrong, which its job says."""
    from lora_exp.errors import UserError
    from lora_exp.schema import to_config

    plain = copy.deepcopy(composed)
    with open_dict(plain):
        del plain["hydra"]
    try:
        return to_config(plain)
    except (UserError, OmegaConfBaseException):
        return None


def _number_lines(job: DictConfig) -> None:
    """Lines of jobs that are open at once say whose they are."""
    if isinstance(line := OmegaConf.select(job, _FORMAT), str):
        with open_dict(job):
            OmegaConf.update(job, _FORMAT, f"#{job.hydra.job.num} {line}")


def _hydra_config() -> Callable[[], object]:
    """The config of the job whose turn it is, as Hydra knows it."""
    instance = HydraConfig.instance()
    known = instance.cfg

    def put_back() -> None:
        instance.cfg = known

    return put_back
