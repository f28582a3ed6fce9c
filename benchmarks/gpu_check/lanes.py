"""Lanes of unlike rank in one pass over a layer, their factors multiplied each by itself and batched."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.pairs import Holder
from benchmarks.rows import Row
from benchmarks.timing import median_ms, race, ratio
from lora_exp.adapters import LoraConfig, LoraModel

from .checks import LIMITS, Case, LeftOut, differences, wait
from .layers import rounded

RANKS = (2, 4, 8, 8, 8, 16, 24, 32)
NAMES = {"each": False, "batched": True}
_ROWS, _LENGTH = 2, 24  # of a lane


def cases(device: torch.device) -> Iterator[Case]:
    for how, dtype in ((how, dtype) for how in NAMES for dtype in LIMITS):
        name = f"{len(RANKS)} lanes, {how}, {str(dtype).removeprefix('torch.')}: outputs and gradients as in float64"
        yield name, LIMITS[dtype], partial(_against_float64, how, dtype, device)
    yield "lanes, batched: a pass waits for the device nowhere", 0.0, partial(_waits, device)


def measure(device: torch.device, width: int = 2048, rounds: int = 20) -> list[Row]:
    """Forward and backward of a layer with a lane for each rank: each by itself over batched."""
    found = []
    for tokens in (16, 256):
        model = lanes(nn.Linear(width, width)).to(device)
        x = torch.randn(len(RANKS), tokens, width, device=device)
        sides = {how: functools.partial(_timed, model, x, how) for how in NAMES}
        times = race(sides, rounds)
        row: Row = {"lanes": len(RANKS), "tokens of a lane": tokens, "size": f"{width}→{width}", **median_ms(times)}
        found.append({**row, **ratio(times, "each", "batched")})
    return found


def lanes(layer: nn.Linear) -> LoraModel:
    """One adapter a lane, with factors as after some training."""
    torch.manual_seed(2)
    model = LoraModel(Holder(layer), LoraConfig(rank=RANKS[0], target_modules=["layer"]), "lane_0", verbose=False)
    for place, rank in enumerate(RANKS[1:], 1):
        model.add_adapter(f"lane_{place}", LoraConfig(rank=rank, target_modules=["layer"]))
    with torch.no_grad():
        for name in model.configs:
            for parameter in model.adapter_parameters(name).values():
                parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def _against_float64(how: str, dtype: torch.dtype, device: torch.device) -> float:
    torch.manual_seed(0)
    model = rounded(lanes(nn.Linear(192, 320)), dtype)
    x, grad = torch.randn(len(RANKS) * _ROWS, _LENGTH, 192).to(dtype), torch.randn(len(RANKS) * _ROWS, _LENGTH, 320)
    exact = _step(copy.deepcopy(model).double(), x.double(), grad.double(), "each")
    return differences(_step(model.to(device), x.to(device), grad.to(device), how), exact)


def _step(model: LoraModel, x: Tensor, grad: Tensor, how: str) -> dict[str, Tensor]:
    model.route_state.batches_lanes = NAMES[how]
    x = x.clone().requires_grad_()
    with model.route({name: len(x) // len(RANKS) for name in model.configs}):
        out = model(x)
    out.backward(grad.to(out.dtype))
    found = {"output": out.detach()} | ({} if x.grad is None else {"input": x.grad})
    for name in model.configs:
        for key, value in model.adapter_parameters(name).items():
            if value.grad is not None:
                found[f"{name}.{key}"] = value.grad
    return found


def _timed(model: LoraModel, x: Tensor, how: str) -> None:
    wait(x.device)
    model.zero_grad()
    _step(model, x, torch.ones_like(x), how)
    wait(x.device)


def _waits(device: torch.device) -> float:
    if device.type != "cuda":
        raise LeftOut("a CPU computes as it is asked")
    model, x = lanes(nn.Linear(192, 192)).to(device), torch.randn(len(RANKS), _LENGTH, 192, device=device)
    _step(model, x, x, "batched")
    torch.cuda.set_sync_debug_mode("error")
    try:
        _step(model, x, x, "batched")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return 0.0
