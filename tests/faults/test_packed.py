"""A signal while several jobs are open in one process."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lora_exp.job import read_outcome

TURNS = ["hydra/launcher=packed", "hydra.launcher.lanes=8", "hydra.launcher.passes=turns"]


def status(folder: Path) -> str:
    outcome = read_outcome(folder)
    assert outcome is not None
    return outcome.status


def test_a_signal_ends_all_that_are_open_and_they_go_on(forked: Callable[..., Any], tiny_overrides: list[str]) -> None:
    swept = [*tiny_overrides, "rank=2,4", "dropout=0.3", "hydra.sweep.dir=outputs/s", "-m", *TURNS]
    whole = forked(*swept)
    aim = {"target": "lora_exp.training.loop:_accumulate", "at": 5, "do": "signal", "signal": int(signal.SIGTERM)}
    stopped = forked(*swept, **aim)
    assert stopped.code == 143, stopped.err
    assert stopped.statuses() == ["KILLED", "KILLED", "KILLED"]
    assert [status(stopped.folder / "outputs/s" / str(number)) for number in (0, 1)] == ["KILLED", "KILLED"]
    ended = forked(*swept, "resume=auto", folder=stopped.folder)
    assert ended.code == 0, ended.err
    for number in (0, 1):
        assert ended.earned(f"outputs/s/{number}") == whole.earned(f"outputs/s/{number}")
