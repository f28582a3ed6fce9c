"""Prints how many MiB one side needs above what is loaded: run in a process of its own."""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch

from lora_exp.machine.memory import peak_gib, reset_peak

from .models import llama, loss_head_sides, training_step
from .pairs import PROJECTIONS, Setup, three


def main(what: str, side: str, dtype: str) -> None:
    step = _loss(side, dtype) if what == "loss" else _training(side, dtype, what == "DoRA")
    cpu = torch.device("cpu")
    reset_peak(cpu)
    before = peak_gib(cpu)
    for _ in range(3):
        step()
    print(round(1024 * (peak_gib(cpu) - before), 1))


def _training(side: str, dtype: str, dora: bool) -> Callable[[], object]:
    model = three(llama("small", dtype), Setup(dora=dora, dtype=dtype), PROJECTIONS)[side]
    return training_step(model, 2, 512, side == "ours")


def _loss(side: str, dtype: str) -> Callable[[], object]:
    forward = loss_head_sides(dtype, 1024, 49152)[side]
    torch.ones(256, 256) @ torch.ones(256, 256)  # the BLAS's own buffers
    return lambda: forward().backward()


if __name__ == "__main__":
    main(*sys.argv[1:])
