"""hydra-submitit-launcher's launchers, which wait for every job: a job that dies costs only itself."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import submitit
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, filter_overrides
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf
from omegaconf import OmegaConf

from hydra_plugins.lora_exp_launchers._gathered import failed
from lora_exp.machine import signals

_OF_EXECUTOR = {"submitit_folder", "max_num_timeout"}


class _Waiting(submitit_launcher.BaseSubmititLauncher):  # type: ignore[misc]  # the plugin has no types
    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        submitit_launcher.log.info(f"{len(job_overrides)} jobs by submitit ({self._EXECUTOR}) into {folder}")
        for number, given in enumerate(job_overrides, start=initial_job_idx):
            submitit_launcher.log.info(f"\t#{number} : {' '.join(filter_overrides(given))}")
        state = Singleton.get_state()
        tasks = [
            (list(given), "hydra.sweep.dir", number, f"job_{number}", state)
            for number, given in enumerate(job_overrides, start=initial_job_idx)
        ]
        jobs = self._executor().map_array(self, *zip(*tasks, strict=True))
        _wait(jobs)
        return [_return(job, given) for job, given in zip(jobs, job_overrides, strict=True)]

    def _executor(self) -> submitit.AutoExecutor:
        more = {"max_num_timeout"} & set(self.params)
        settings = {f"{self._EXECUTOR}_{name}": self.params[name] for name in more}
        executor = submitit.AutoExecutor(folder=self.params["submitit_folder"], cluster=self._EXECUTOR, **settings)
        executor.update_parameters(**dict(self._resources()))
        return executor

    def _resources(self) -> Iterator[tuple[str, Any]]:
        """What every executor knows has its own name, the rest that of the executor before it."""
        everywhere = set(OmegaConf.structured(BaseQueueConf).keys())
        for name, value in self.params.items():
            if name not in _OF_EXECUTOR:
                yield (name if name in everywhere else f"{self._EXECUTOR}_{name}"), value


class LocalLauncher(_Waiting):
    """On this machine."""

    _EXECUTOR = "local"


class SlurmLauncher(_Waiting):
    """In Slurm's queue."""

    _EXECUTOR = "slurm"


def _wait(jobs: Sequence[submitit.Job[JobReturn]]) -> None:
    """Until all are done. Once the sweep is asked to stop, those that only stand in a queue are taken out of it."""
    is_emptied = False
    while not all(job.done() for job in jobs):
        if signals.received() is not None and not is_emptied:
            is_emptied = True
            for job in jobs:
                if job.state == "PENDING":
                    job.cancel()
        time.sleep(0.2)


def _return(job: submitit.Job[JobReturn], overrides: Sequence[str]) -> JobReturn:
    try:
        found: JobReturn = job.results()[0]
        return found
    except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
        return failed(overrides, error)
