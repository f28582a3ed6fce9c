"""What a process does that another one leads: the jobs that it is told, until there are none any more."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from lora_exp.config import Config
from lora_exp.job import Job
from lora_exp.machine import signals
from lora_exp.machine.launch import Launch
from lora_exp.plugins import import_plugins
from lora_exp.schema import to_config

_CLOSING_S = 20.0  # how long the leader is waited for after an end, before a launcher sees that this process goes


def tell(launch: Launch, job: Job) -> None:
    """Have the others do ``job`` too."""
    launch.tell({"config": job.config_yaml, "folder": str(job.folder.resolve()), "stands_in": str(Path.cwd())})


def follow(launch: Launch) -> NoReturn:
    """Do every job that the leader tells, without a word, and end as the leader ends.

    What goes wrong here is known to the leader, which says it, and goes on with a sweep's next job or does not.
    A leader that is gone without a word (``kill -9``) took the store with it: that ends with 1.
    """
    from torch.distributed import DistNetworkError

    try:
        sys.exit(_followed(launch))
    except DistNetworkError:
        sys.exit(1)


def _followed(launch: Launch) -> int:
    """The leader's exit code, once it tells no more jobs."""
    _be_silent()
    with signals.at_once():
        from lora_exp.run import follow as do
    patience_s = 0.0
    while (job := launch.next_job(patience_s)) is not None:
        patience_s = _CLOSING_S
        with contextlib.suppress(Exception, signals.Stopped), signals.between_steps():
            do(_config(job), Job(Path(job["folder"])))
            patience_s = 0.0
    return launch.code()


def _config(job: Mapping[str, Any]) -> Config:
    given = OmegaConf.create(job["config"])
    assert isinstance(given, DictConfig)
    import_plugins(list(given.plugins), Path(job["stands_in"]))
    composed = OmegaConf.merge(ConfigStore.instance().load("schema.yaml").node, given)
    assert isinstance(composed, DictConfig)
    config = to_config(composed)
    config.tracking.enabled = False
    return config


def _be_silent() -> None:
    """One of several processes speaks."""
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    sys.stdout = io.StringIO()
