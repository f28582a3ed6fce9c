"""Our layers' time against PEFT's on the device: the GPU's column of the results."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from benchmarks.layers import means
from benchmarks.pairs import DTYPES, Setup, has_nf4, linear, three, touch
from benchmarks.rows import Row
from benchmarks.timing import median_ms, race, ratio

from .checks import wait

SIZES = ((2048, 2048), (4096, 4096), (4096, 11008))
TOKENS = 2048
ROUNDS = 20


def measure(device: torch.device, sizes: tuple[tuple[int, int], ...] = SIZES, tokens: int = TOKENS) -> Row:
    """Forward and backward of one adapted layer: rows, and each kind's geometric mean of PEFT's time over ours."""
    rows = [_row(setup, size, tokens, device) for setup in setups() for size in sizes]
    return {"rows": rows, "means": means(rows)}


def setups() -> Iterator[Setup]:
    for nf4 in (False, True) if has_nf4() else (False,):
        for dora in (False, True):
            for dtype in DTYPES:
                for dropout in (0.0, 0.05):
                    yield Setup(8, dropout, dora, dtype, nf4)


def _row(setup: Setup, size: tuple[int, int], tokens: int, device: torch.device) -> Row:
    torch.manual_seed(0)
    models = {name: model.to(device) for name, model in three(linear(*size, setup), setup, ["layer"]).items()}
    x = torch.randn(1, tokens, size[0], device=device, dtype=DTYPES[setup.dtype], requires_grad=True)
    grad = torch.randn(1, tokens, size[1], device=device, dtype=DTYPES[setup.dtype])
    sides = {name: functools.partial(_step, models[name], x, grad) for name in ("ours", "peft")}
    times = race(sides, ROUNDS, {name: functools.partial(touch, models[name]) for name in sides})
    row: Row = {"case": setup.label, "size": f"{size[0]}→{size[1]}", **median_ms(times)}
    return {**row, **ratio(times, "peft", "ours"), "group": setup.label.rpartition(" r=")[0]}


def _step(model: nn.Module, x: Tensor, grad: Tensor) -> None:
    wait(x.device)
    x.grad = None
    model(x).backward(grad)
    wait(x.device)
