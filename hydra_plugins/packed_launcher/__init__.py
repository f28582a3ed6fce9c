"""``hydra/launcher=packed``: the jobs of a sweep in this process, over one frozen base."""

from hydra_plugins.packed_launcher.launcher import PackedLauncher

__all__ = ["PackedLauncher"]
