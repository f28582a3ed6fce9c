"""How freed memory is kept: a training step makes next to no page faults, unless the user has a wish."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys

import pytest

from lora_exp.machine.allocator import WISHES, keep_freed_memory

_STEPS = """
import resource
from lora_exp.machine.allocator import keep_freed_memory
import torch
keeps = keep_freed_memory() if {asked} else False
def step():
    blocks = [torch.ones(1 << 18) for _ in range(20)]
    return sum(block.sum() for block in blocks)
for _ in range(3): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10): step()
print(int(keeps), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(asked: bool) -> tuple[bool, int]:
    """Whether freed memory is kept, and the page faults of ten steps that allocate 20 MiB each."""
    clean = {key: value for key, value in os.environ.items() if key not in WISHES}
    command = [sys.executable, "-c", _STEPS.format(asked=asked)]
    done = subprocess.run(command, env=clean, capture_output=True, text=True, check=True)
    keeps, faults = map(int, done.stdout.split())
    return bool(keeps), faults


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_is_used_again() -> None:
    (kept, few), (_, many) = run(True), run(False)
    assert kept
    assert few < 500 < 5000 < many


@pytest.mark.parametrize("name", WISHES)
def test_a_users_wish_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)  # not to be asked
    monkeypatch.setenv(name, "131072")
    assert not keep_freed_memory()
