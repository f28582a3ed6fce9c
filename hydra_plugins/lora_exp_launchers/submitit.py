"""``hydra/launcher=submitit_local|submitit_slurm``: each job a process of its own, here or in Slurm's queue."""

from __future__ import annotations

from hydra.types import TaskFunction

from hydra_plugins.lora_exp_launchers._around import TERMINAL_SIGNALS, Around


class LocalLauncher(Around):
    """hydra-submitit-launcher's for this machine: all jobs at once."""

    launcher = "hydra_plugins.lora_exp_launchers._submitit.LocalLauncher"
    extra = "submitit"
    unheard = TERMINAL_SIGNALS

    def task(self, given: TaskFunction) -> TaskFunction:
        from hydra_plugins.lora_exp_launchers._requeued import Requeued

        return Requeued(given, self.shares_output)


class SlurmLauncher(LocalLauncher):
    """hydra-submitit-launcher's for Slurm."""

    launcher = "hydra_plugins.lora_exp_launchers._submitit.SlurmLauncher"
    unheard = ()
