"""Whether a process of an earlier time is gone."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from lora_exp.machine.process import Process


def test_this_one_lives_and_is_read_as_it_was_written() -> None:
    mine = Process.mine()
    assert mine.pid == os.getpid()
    assert Process.read(str(mine)) == mine
    assert not mine.is_gone()


def test_one_that_ended_is_gone_and_so_is_one_whose_number_another_has() -> None:
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    ended.wait()
    mine = Process.mine()
    assert replace(mine, pid=ended.pid).is_gone()
    assert replace(mine, started=mine.started + "1").is_gone()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells")
def test_one_that_ended_and_was_not_yet_waited_for_is_gone() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert replace(Process.mine(), pid=child.pid).is_gone()
    child.communicate()


@pytest.mark.parametrize("field", ["host", "space"])
def test_another_hosts_or_containers_is_never_said_to_be_gone(field: str) -> None:
    elsewhere = replace(Process.mine(), pid=2**22 + 1, **{field: "another"})
    assert not elsewhere.is_gone()


@pytest.mark.parametrize("text", ["", "{}", "[1]", "null", '{"pid": 1}'])
def test_what_is_none_is_read_as_none(text: str) -> None:
    assert Process.read(text) is None
