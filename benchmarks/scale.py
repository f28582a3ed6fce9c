"""How time and memory grow with rank, adapted layers and vocabulary: exponents b of y ~ x^b."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from .memory import retained_bytes
from .models import SHAPES, llama, training_step
from .pairs import PROJECTIONS, Holder, Setup, three, touch
from .rows import Row
from .timing import exponent, race


def run(quick: bool) -> Row:
    ranks = [4, 16, 64] if quick else [4, 8, 16, 32, 64, 128, 256]
    depths = [1, 2, 4] if quick else [1, 2, 4, 7]
    sizes = [1024, 4096] if quick else [1024, 4096, 16384, 49152]
    found = {"rank": _by_rank(ranks), "layers": _by_layers(depths), "vocabulary": _by_vocabulary(sizes)}
    return {"rows": [_summary(what, points) for what, points in found.items()], "points": found}


def _by_rank(ranks: list[int]) -> list[dict[str, float]]:
    """What the adapter adds to a frozen 1024→1024 layer, 512 tokens."""
    x, points = torch.randn(512, 1024, requires_grad=True), []
    grad = torch.randn(512, 1024)
    for rank in ranks:
        models = three(Holder(nn.Linear(1024, 1024, bias=False)), Setup(rank), ["layer"])
        sides = {name: functools.partial(_pass, models[name], x, grad) for name in ("floor", "ours", "peft")}
        times = race(sides, 11, {name: functools.partial(touch, models[name]) for name in sides})
        best = {name: sorted(values)[len(values) // 4] * 1e3 for name, values in times.items()}
        added = {f"{name}_added_ms": max(best[name] - best["floor"], 1e-3) for name in ("ours", "peft")}
        points.append({"x": rank, **added, "ours_bytes": retained_bytes(models["ours"], x)})
    return points


def _pass(model: nn.Module, x: Tensor, grad: Tensor) -> None:
    model(x).backward(grad)


def _by_layers(counts: list[int]) -> list[dict[str, float]]:
    """The small Llama with the first n projections of each block adapted."""
    return [{"x": n, **_step_times(llama("small", "fp32"), PROJECTIONS[:n])} for n in counts]


def _by_vocabulary(sizes: list[int]) -> list[dict[str, float]]:
    points = []
    for size in sizes:
        before = SHAPES["small"]["vocab_size"]
        SHAPES["small"]["vocab_size"] = size
        points.append({"x": size, **_step_times(llama("small", "fp32"), PROJECTIONS)})
        SHAPES["small"]["vocab_size"] = before
    return points


def _step_times(base: nn.Module, targets: list[str]) -> dict[str, float]:
    models = three(base, Setup(), targets)
    times = race({name: training_step(models[name], 1, 256, name == "ours") for name in ("ours", "peft")}, 5)
    return {f"{name}_ms": sorted(values)[len(values) // 2] * 1e3 for name, values in times.items()}


def _summary(what: str, points: list[dict[str, float]]) -> Row:
    xs = [point["x"] for point in points]
    curves = [key for key in points[0] if key != "x"]
    fitted = {f"{key.replace('_', ' ')} exponent": exponent(xs, [point[key] for point in points]) for key in curves}
    return {"case": f"{what} {xs[0]:g}…{xs[-1]:g}", **fitted}
