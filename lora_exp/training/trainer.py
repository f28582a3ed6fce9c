"""What a trainer is: it takes a job's work and hands over a plain record of metrics a logged step.

A file in ``trainers/`` says ``@trainer("name")`` above a class that follows ``Trainer``: ``trainer=name`` chooses it.
Its file is imported to look at a config, so that what takes long to import is imported inside its methods.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from lora_exp.config import Config, OptimizerConfig, TrainConfig
from lora_exp.registry import Registry

if TYPE_CHECKING:
    from lora_exp.backends import Adapted
    from lora_exp.data import Data, DataKind
    from lora_exp.machine.distributed import World
    from lora_exp.machine.place import Place
    from lora_exp.training.best import Best
    from lora_exp.training.checkpoints import Checkpoint, Checkpoints
    from lora_exp.training.loop import Passes, Record
    from lora_exp.training.timetable import Timetable

    Keep = Callable[[Record], object]


def _alone() -> World:
    from lora_exp.machine.distributed import ALONE

    return ALONE


@dataclass(frozen=True)
class Work:
    """What is to be trained, on which rows, by which objective, where, and the sections that say how.

    ``timetable``: what ``train`` says of its length and intervals, for these rows. ``best`` is fed with each record
    that is kept: a trainer ends when it says ``should_stop``. ``checkpoints``: where the training's state is kept;
    None: nowhere. ``start``: what to go on from; None: from the beginning. ``world``: the processes that do the work
    together; the timetable counts the micro batches of all of them. ``at_start`` and ``passes``: see ``loop.Forward``.
    ``evaluation_rows``: how many are evaluated at once; None: a micro batch.
    """

    adapted: Adapted
    data: Data
    kind: DataKind
    place: Place
    train: TrainConfig
    optimizer: OptimizerConfig
    seed: int
    timetable: Timetable
    best: Best
    world: World = field(default_factory=_alone)
    checkpoints: Checkpoints | None = None
    start: Checkpoint | None = None
    at_start: Callable[[Callable[[], dict[str, float]]], dict[str, float]] = field(default=lambda make: make())
    passes: Passes | None = None
    evaluation_rows: int | None = None


class Trainer:
    """Trains ``Work``. Its records are those of ``training.loop.train``, whoever's loop made them.

    ``resumes``: whether it keeps checkpoints, and goes on from ``Work.start``. ``is_parallel``: whether it knows
    ``Work.world``, and shares its work with other processes.
    """

    resumes: ClassVar[bool] = False
    is_parallel: ClassVar[bool] = False

    def problems(self, config: Config) -> list[str]:
        """What it cannot do of the config, as can be seen before anything is loaded."""
        return []

    def train(self, work: Work, keep: Keep) -> None:
        """Train to the end. ``keep`` gets each record when it is known, and ends the training by an exception."""
        raise NotImplementedError


trainers: Registry[type[Trainer]] = Registry("trainer", "lora_exp.training.trainers")
trainer = trainers.add
