"""What Hydra tells us before anything runs: where results will go, and that a sweep has begun."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write

from lora_exp.adapters.files.whole import write_text
from lora_exp.composing import check_composed, check_mode, refuse_uncomposed, swept_keys
from lora_exp.config import ConfigError
from lora_exp.credentials import CredentialError, refuse_in_config
from lora_exp.job import STUDY_FILE, SWEPT_FILE, filed
from lora_exp.machine.claims import FolderInUseError, claim
from lora_exp.plugins import PluginError
from lora_exp.sweep.replicates import check_study, repeat
from lora_exp.sweep.stopped import Limit, limit_of

# The sweep this process has begun and not yet reported: Hydra has no hook for one that ends in an error.
begun: list[Path] = []
_HYDRAS = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
_OURS = "hydra_plugins.lora_exp_launchers.basic.BasicLauncher"
limits: dict[Path, Limit] = {}  # of those whose sweeper stops at failed jobs


class SweepCallback(Callback):
    """Looks before Hydra writes anything, and notes the sweep for ``lora_exp.__main__`` to close."""

    def on_run_start(self, config: DictConfig, **_: object) -> None:
        _prepare(config, Path(config.hydra.run.dir), "hydra.run.dir", check_mode)

    def on_multirun_start(self, config: DictConfig, **_: object) -> None:
        folder = Path(config.hydra.sweep.dir)
        _prepare(config, folder, "hydra.sweep.dir", check_study)
        _show_as_a_sweep(config)
        write_study(folder, config)
        begun.append(folder.resolve())
        if limit := limit_of(config):
            limits[folder.resolve()] = limit
        write_swept(folder, config)


def _show_as_a_sweep(config: DictConfig) -> None:
    """Hydra's own launcher runs its jobs inside ours, which shows them as one sweep.

    Not by a file of ours with its name, of which Hydra would warn whoever composes; nor by a default, which would take
    precedence over a launcher that an experiment's file chooses.
    """
    if config.hydra.launcher.get("_target_") == _HYDRAS:
        with read_write(config):
            config.hydra.launcher._target_ = _OURS


def write_swept(folder: Path, config: DictConfig) -> None:
    """Note what differs between the jobs, for those in other processes too: it is what they are named by."""
    write_text(folder / SWEPT_FILE, json.dumps(swept_keys(config)) + "\n")


def write_study(folder: Path, config: DictConfig) -> None:
    """Note what the verdict is about, and have each job done with as many seeds as it asks for."""
    repeat(config)
    write_text(folder / STUDY_FILE, json.dumps(OmegaConf.to_container(config.study, resolve=True)) + "\n")


def _prepare(config: DictConfig, folder: Path, setting: str, *checks: Callable[[DictConfig], None]) -> None:
    try:
        for check in (refuse_in_config, check_composed, refuse_uncomposed, *checks):
            check(config)
        _require_writable(folder)
        claim(folder, setting)
    except PluginError as error:
        _require_writable(folder)
        sys.stderr.write(f"{error}{filed(folder, error.trace) if error.trace else ''}\n")
        sys.exit(1)
    except (ConfigError, CredentialError, FolderInUseError) as error:
        # SystemExit: Hydra turns any other exception of a callback into a warning and runs on.
        sys.stderr.write(f"{error}\n")
        sys.exit(1)


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return
    except OSError as error:
        sys.stderr.write(
            f"Results cannot be written to {folder} ({error.strerror}): make it writable, stand in another folder, "
            "or set hydra.run.dir (hydra.sweep.dir for a sweep)\n"
        )
        sys.exit(1)
