"""``hydra/launcher=ray``: each job a task of Ray's, on this machine or in a cluster."""

from __future__ import annotations

from hydra_plugins.lora_exp_launchers._around import Around


class RayLauncher(Around):
    """Ours, over ``ray.remote``. Ray sees to it that its processes do not hear a terminal."""

    launcher = "hydra_plugins.lora_exp_launchers._ray.TaskLauncher"
    extra = "ray"
