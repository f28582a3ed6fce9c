"""A signal ends the process wherever it comes, and the runs it closes say so."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from lora_exp.job import read_outcome

Forked = Callable[..., Any]
AIMS = {
    "collection": {"target": "lora_exp.machine.memory:gc.collect", "do": "signal in a finaliser"},
    "collection, weak reference": {
        "target": "lora_exp.machine.memory:gc.collect", "do": "signal in a finaliser", "weak": True,
    },
    "evaluation": {"target": "lora_exp.training.loop:evaluate", "at": 2, "do": "signal"},
    "step": {"target": "lora_exp.training.loop:_accumulate", "at": 2, "do": "signal"},
    "saving": {"target": "lora_exp.keeping:replace_folder", "do": "signal"},
    "loading": {"target": "lora_exp.models:load_base", "do": "signal"},
    "between the files of an adapter": {"target": "lora_exp.adapters.files.peft_folder:write_text", "do": "signal"},
}  # fmt: skip


SLOW = [
    pytest.param(aim, number, marks=pytest.mark.slow)
    for aim in AIMS
    for number in (signal.SIGTERM, signal.SIGHUP)
    if aim != "evaluation"
]


@pytest.mark.parametrize(
    ("aim", "number"),
    [*((aim, signal.SIGINT) for aim in AIMS), ("evaluation", signal.SIGTERM), ("evaluation", signal.SIGHUP), *SLOW],
)
def test_no_signal_is_swallowed(aim: str, number: int, forked: Forked, tiny_overrides: list[str]) -> None:
    done = forked(*tiny_overrides, "hydra.run.dir=outputs/job", signal=int(number), **AIMS[aim])
    assert done.code == 128 + number, done.err
    assert set(done.statuses()) <= {"KILLED"}
    assert "Traceback" not in done.err
    outcome = read_outcome(done.folder / "outputs/job")
    assert outcome is not None
    assert (outcome.status, outcome.error) == ("KILLED", signal.Signals(number).name)


@pytest.mark.parametrize("again_s", [0.5, pytest.param(1.0, marks=pytest.mark.slow)])
def test_a_second_signal_ends_at_once_and_still_closes_the_runs(
    again_s: float, forked: Forked, tiny_overrides: list[str]
) -> None:
    aim = {"target": "lora_exp.training.loop:_accumulate", "at": 3, "do": "signal later", "delays": [0.1, again_s]}
    done = forked(*tiny_overrides, "train.steps=20000", "rank=2,4", "-m", signal=int(signal.SIGINT), **aim)
    assert done.code == 130
    assert done.statuses() == ["KILLED", "KILLED"]
    assert "Traceback" not in done.err


def test_a_sweep_stops_after_a_signal_between_its_jobs(forked: Forked, tiny_overrides: list[str]) -> None:
    aim = {"target": "lora_exp.__main__:_finish", "do": "signal", "signal": int(signal.SIGTERM)}
    done = forked(*tiny_overrides, "rank=2,4", "-m", **aim)
    assert done.code == 143
    assert done.statuses() == ["FINISHED", "KILLED"]  # the job that was done, and the sweep
    assert "Sweep, best first" in done.out


def test_what_is_ignored_stays_ignored() -> None:
    from lora_exp.machine import signals

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.noted():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
