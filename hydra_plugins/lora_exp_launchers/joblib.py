"""``hydra/launcher=joblib``: several jobs at once on this machine, in a pool of processes."""

from __future__ import annotations

import signal

from hydra_plugins.lora_exp_launchers._around import TERMINAL_SIGNALS, Around


class JoblibLauncher(Around):
    """hydra-joblib-launcher's. A process of its pool that ends while it has no job would end all others."""

    launcher = "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher"
    extra = "joblib"
    shares_output = True
    unheard = (*TERMINAL_SIGNALS, signal.SIGTERM)
