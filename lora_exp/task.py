"""What ``task=name`` does: one class a task, in a file of ``tasks/``.

Its file is imported to look at a config, so that what takes long to import is imported inside its methods.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from lora_exp.registry import Registry

if TYPE_CHECKING:
    from lora_exp.config import Config
    from lora_exp.job import AnyResult, Job


class Task:
    """``trains``: whether data is read and a model trained.

    ``of_runs``: whether ``run`` names finished runs, the first of which the config is taken from; ``of_exports``:
    whether it names what ``task=export`` wrote of one, which has that config too. ``reads_data``: whether the files of
    ``data`` must be there for it, too. ``of_folder``: whether ``run`` is a folder that is looked into.
    """

    result: ClassVar[type[AnyResult]]
    trains: ClassVar[bool] = False
    of_runs: ClassVar[bool] = False
    reads_data: ClassVar[bool] = False
    of_exports: ClassVar[bool] = False
    of_folder: ClassVar[bool] = False

    def problems(self, config: Config) -> list[str]:
        """What can be seen to be wrong with the config, for this task alone."""
        return []

    def run(self, config: Config, job: Job) -> AnyResult:
        """Do it. Raises UserError for what the user can mend."""
        raise NotImplementedError


tasks: Registry[type[Task]] = Registry("task", "lora_exp.tasks")
task = tasks.add
