"""What stands around every launcher: the sweep is written down and shown, and signals reach its jobs."""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lora_exp.composing import expect_schemas
from lora_exp.errors import UserError
from lora_exp.machine import signals, stopping

SAID_FILE = "terminal.txt"
expect_schemas()  # here, as a launcher's process imports this file before it composes a job's config


class StoppedError(CompactHydraException):
    """A job ended by a signal: for the process that launched it no end of its own, but of a job."""


class Around(Launcher):
    """A launcher of Hydra's or a plugin's: the class ``launcher`` names, which ``extra`` installs.

    It gets the settings that stand in the launcher's file.
    """

    launcher: ClassVar[str]
    extra: ClassVar[str | None] = None
    runs_here: ClassVar[bool] = False  # whether its jobs run in this process
    shares_output: ClassVar[bool] = False  # whether theirs would come out here
    unheard: ClassVar[tuple[int, ...]] = ()  # signals that its processes get by the stop file alone

    def __init__(self, **settings: Any) -> None:
        self._settings = settings

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config
        self._inner = self.inner()
        self._inner.setup(hydra_context=hydra_context, task_function=self.task(task_function), config=config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lora_exp.sweep.live import launched

        folder = Path(str(self._config.hydra.sweep.dir)).resolve()
        trials = OmegaConf.select(self._config, "hydra.sweeper.n_trials")
        shown = launched(folder, job_overrides, initial_job_idx, trials, tells_jobs=not self.runs_here)
        with shown, self._signals_reach_jobs(folder):
            return self._inner.launch(job_overrides, initial_job_idx=initial_job_idx)

    def task(self, given: TaskFunction) -> TaskFunction:
        """What a job does, in whichever process it does it."""
        return given if self.runs_here else Elsewhere(given, self.shares_output)

    def inner(self) -> Launcher:
        """The launcher itself. Raises UserError where its package is missing."""
        module, _, name = self.launcher.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), name)
            found_launcher: Launcher = found(**self._settings)
        except ImportError as error:
            raise UserError(
                f"hydra/launcher={self.extra} needs a package that is missing ({error.name or error}): "
                f"pip install 'lora_exp[{self.extra}]'"
            ) from error
        return found_launcher

    @contextlib.contextmanager
    def _signals_reach_jobs(self, folder: Path) -> Iterator[None]:
        if self.runs_here:
            yield
            return
        with stopping.passed_on(folder), stopping.deaf_children(*self.unheard):
            yield


class Elsewhere:
    """A job's task in a process that a launcher has begun for it. What it says goes to a file where it would otherwise
    come out in the middle of what others say."""

    def __init__(self, task: TaskFunction, shares_output: bool) -> None:
        self._task, self._shares_output = task, shares_output

    def __call__(self, composed: DictConfig) -> Any:
        settings = HydraConfig.get()
        sweep = Path(settings.sweep.dir).resolve()
        if stopping.is_asked(sweep):
            raise StoppedError("not begun: the sweep was asked to stop")
        file = Path(settings.runtime.output_dir) / SAID_FILE
        said = said_to(file) if self._shares_output else contextlib.nullcontext()
        with said, signals.noted(), stopping.hearing():
            try:
                with stopping.heeded(sweep):
                    return self._task(composed)
            except signals.Stopped as stop:
                raise StoppedError(f"ended by {stop}") from None


@contextlib.contextmanager
def said_to(file: Path) -> Iterator[None]:
    """What this process says, whichever of its libraries, goes to ``file``."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    with file.open("a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, descriptor in enumerate(before, start=1):
            os.dup2(descriptor, number)
            os.close(descriptor)


TERMINAL_SIGNALS = tuple(number for name in ("SIGINT", "SIGHUP") if (number := getattr(signal, name, None)) is not None)
