"""One job after another, in this process: what ``lora_exp.sweep.callback`` puts around ``hydra/launcher=basic``."""

from __future__ import annotations

from hydra_plugins.lora_exp_launchers._around import Around


class BasicLauncher(Around):
    """Hydra's own."""

    launcher = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    runs_here = True
