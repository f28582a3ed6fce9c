"""A sweep's launching process and its jobs: what one is asked, the others do."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from lora_exp.machine import signals, stopping
from lora_exp.machine.process import Process

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Send this process a signal that is a wish of its own."""
    monkeypatch.setattr(signals, "_SAME_REQUEST_S", 0.0)
    before = {number: signal.signal(number, signal.SIG_DFL) for number in NUMBERS}
    try:
        with signals.noted():
            yield lambda number: os.kill(os.getpid(), number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wait_for_a_signal(requests: int) -> None:
    until = time.monotonic() + 30
    while signals._state.requests < requests and time.monotonic() < until:
        time.sleep(0.01)


def test_the_process_that_launches_waits_on_and_tells_its_jobs(tmp_path: Path, ask: Callable[[int], None]) -> None:
    reached = [stopping._asked(tmp_path)]

    def launch() -> None:
        with stopping.passed_on(tmp_path):
            for number in (signal.SIGTERM, signal.SIGINT):
                ask(number)
                reached.append(stopping._asked(tmp_path))

    with pytest.raises(signals.Stopped, match="SIGTERM"):
        launch()
    assert reached == [None, (signal.SIGTERM, 1), (signal.SIGTERM, 2)]


def test_a_third_request_ends_the_wait(tmp_path: Path, ask: Callable[[int], None]) -> None:
    came = 0

    def launch() -> None:
        nonlocal came
        with stopping.passed_on(tmp_path):
            while came < 5:
                came += 1
                ask(signal.SIGINT)

    with pytest.raises(signals.Stopped):
        launch()
    assert came == 3


def test_what_an_earlier_sweep_in_the_folder_was_asked_is_forgotten(tmp_path: Path, ask: Callable[[int], None]) -> None:
    with pytest.raises(signals.Stopped), stopping.passed_on(tmp_path):
        ask(signal.SIGINT)
    signals.answered()
    with stopping.passed_on(tmp_path):
        assert not stopping.is_asked(tmp_path)


@pytest.mark.parametrize("requests", [1, 2])
def test_a_job_elsewhere_is_asked_as_often(
    requests: int, tmp_path: Path, ask: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.01)
    with signals.while_closing(), stopping.heeded(tmp_path):
        (tmp_path / ".stop.json").write_text(f'{{"signal": {int(signal.SIGINT)}, "requests": {requests}}}')
        wait_for_a_signal(requests)
        time.sleep(0.1)
        assert (signals.received(), signals._state.requests) == (signal.SIGINT, requests)


@pytest.mark.parametrize("is_gone", [True, False])
def test_a_job_whose_launching_process_is_gone_ends(
    is_gone: bool, tmp_path: Path, ask: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stopping, "_LOOK_EVERY_S", 0.01)
    mine = Process.mine()
    (tmp_path / ".in_use.json").write_text(str(replace(mine, pid=2**22 + 1) if is_gone else mine))
    with signals.while_closing(), stopping.heeded(tmp_path):
        if is_gone:
            wait_for_a_signal(1)
        else:
            time.sleep(0.2)
    assert signals.received() == (signal.SIGTERM if is_gone else None)


def test_a_deaf_child_hears_nothing_until_it_has_a_job(ask: Callable[[int], None]) -> None:
    code = (
        "import os, signal\nfrom lora_exp.machine import stopping\n"
        "heard = []\nsignal.signal(signal.SIGINT, lambda *_: heard.append(1))\n"
        "os.kill(os.getpid(), signal.SIGINT)\nprint(len(heard))\n"
        "with stopping.hearing():\n    print(len(heard))\n"
        "os.kill(os.getpid(), signal.SIGINT)\nprint(len(heard))\n"
    )
    with stopping.deaf_children(signal.SIGINT):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        with signals.while_closing():
            ask(signal.SIGINT)  # this process hears it
            wait_for_a_signal(1)
    assert done.stdout.split() == ["0", "1", "1"]
    assert signals.received() == signal.SIGINT
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
