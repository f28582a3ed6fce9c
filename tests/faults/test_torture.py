"""Runs that are killed at random moments and gone on with: TRIALS=30 is what `make torture` does."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

Forked = Callable[..., Any]
JOB = "hydra.run.dir=outputs/job"
LENGTH = ["train.steps=12", "train.eval_every=4", "train.save_every=1", "dropout=0.2", "train.grad_accum_steps=2"]
WRITING = "lora_exp.training.checkpoints:_sync"  # called six times a checkpoint


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("SEED", "0"))


def test_every_killed_run_ends_in_the_same_bits(forked: Forked, tiny_overrides: list[str], seed: int) -> None:
    """A third of the kills come while a checkpoint is written, the others at any moment; some runs are killed twice."""
    trials, drawn = int(os.environ.get("TRIALS", "3")), random.Random(seed)
    begun = time.monotonic()
    whole = forked(*tiny_overrides, JOB, *LENGTH)
    assert whole.code == 0, whole.err
    usual_s, found = time.monotonic() - begun, Counter[str]()
    for trial in range(trials):
        killed = _killed(forked, [*tiny_overrides, JOB, *LENGTH], drawn, trial, usual_s)
        where = _where(killed)
        found[where] += 1
        while drawn.random() < 0.25:
            found["killed again"] += _go_on(forked, tiny_overrides, killed, usual_s * drawn.random()).code != 0
        done = _go_on(forked, tiny_overrides, killed, None)
        assert done.code == 0, done.err
        assert done.earned() == whole.earned()
        assert done.points() == whole.points()
        assert set(done.statuses()) <= {"FINISHED", "KILLED"}
        assert done.statuses().count("FINISHED") == 1
        assert not list((done.folder / "outputs/job/checkpoints").glob(".*"))
        print(f"{trial + 1} of {trials}: killed {where}, ended in the same bits", flush=True)
    print(f"\n{trials} of {trials} trials ended in the same bits; killed: {dict(found)}")


def _killed(forked: Forked, overrides: list[str], drawn: random.Random, trial: int, usual_s: float) -> Any:
    """A run that was killed before it ended: by chance one may be faster."""
    while True:
        if trial % 3 == 0:
            ended = forked(*overrides, target=WRITING, at=drawn.randint(1, 60), do="kill")
        else:
            ended = forked(*overrides, kill_after_s=drawn.uniform(0, usual_s))
        if ended.code == -signal.SIGKILL:
            return ended
        assert ended.code == 0, ended.err


def _go_on(forked: Forked, overrides: list[str], killed: Any, kill_after_s: float | None) -> Any:
    aim = {} if kill_after_s is None else {"kill_after_s": kill_after_s}
    return forked(*overrides, JOB, *LENGTH, "resume=auto", folder=killed.folder, **aim)


def _where(killed: Any) -> str:
    place = killed.folder / "outputs/job/checkpoints"
    if list(place.glob(".*")):
        return "while a checkpoint was written"
    return "between two checkpoints" if list(place.glob("step_*")) else "before the first checkpoint"
