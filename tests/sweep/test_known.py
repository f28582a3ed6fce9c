"""A job belongs to one process at a time: the second waits, and a claim of the dead is none."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lora_exp.sweep import known

CLAIM = """
import sys
from pathlib import Path
from lora_exp.machine.claims import claim
claim(Path("outputs/.jobs/abc"), "")
print("mine", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def other(workplace: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has the job ``abc``."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", CLAIM]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def end(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)


@pytest.mark.parametrize("ending", [end, kill])
def test_the_second_waits_for_the_first_and_says_so(
    ending: Callable[[subprocess.Popen[str]], None],
    other: subprocess.Popen[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    waiting = threading.Event()
    monkeypatch.setattr("lora_exp.sweep.known.signals.obey", waiting.set)

    def release() -> None:
        assert waiting.wait(60)
        ending(other)

    thread = threading.Thread(target=release)
    thread.start()
    with caplog.at_level(logging.INFO), known.claimed("abc", waits=True):
        assert waiting.is_set()
        assert other.wait(60) in (0, -signal.SIGKILL)
        thread.join()
    assert caplog.text.count(f"waits for process {other.pid} on ") == 1


def test_who_does_not_reuse_does_not_wait(other: subprocess.Popen[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO), known.claimed("abc", waits=False):
        assert other.poll() is None
    assert caplog.text == ""


def test_folders_are_known_newest_first_wherever_they_are(workplace: Path) -> None:
    for name in ("outputs/sweeps/a/b/0", "elsewhere", "gone"):
        (workplace / name).mkdir(parents=True)
        known.note("abc", workplace / name)
        known.note("abc", workplace / name)
    (workplace / "gone").rmdir()
    assert known.folders("abc") == [workplace / "elsewhere", workplace / "outputs/sweeps/a/b/0"]
    assert known.folders("other") == []
    lines = (workplace / "outputs/.jobs/abc/folders").read_text().splitlines()
    assert lines == ["sweeps/a/b/0", "../elsewhere", "../gone"]  # so that the whole may be moved


def test_who_has_a_job_already_waits_for_no_other(other: subprocess.Popen[str]) -> None:
    """Else two processes with several jobs open at once could wait for each other."""
    with known.claimed("xyz", waits=True), known.claimed("abc", waits=True):
        assert other.poll() is None
