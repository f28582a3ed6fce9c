"""Peak memory belongs to one job."""

from __future__ import annotations

import sys

import pytest
import torch

from lora_exp.machine.memory import peak_gib, reset_peak

CPU = torch.device("cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset a process's peak")
def test_a_peak_is_not_carried_into_the_next_job() -> None:
    reset_peak(CPU)
    before = peak_gib(CPU)
    block = torch.ones(64 * 2**20)  # 0.25 GiB
    after = peak_gib(CPU)
    del block
    reset_peak(CPU)
    assert after - before > 0.2
    assert peak_gib(CPU) < after - 0.2
