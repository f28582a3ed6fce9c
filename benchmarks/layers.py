"""Forward and backward of one adapted layer."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_exp.adapters.numerics.precision import BLAS, FLOAT32, NATIVE, ONEDNN, Answers, answered, answers, has_onednn

from . import convolutions
from .pairs import DTYPES, Setup, has_nf4, linear, three, touch
from .rows import Row
from .timing import Side, geometric_mean, median_ms, race, ratio

TOKENS = 512


def run(quick: bool) -> Row:
    rounds = 5 if quick else 15
    rows = []
    for setup, shape in cells(quick):
        holder = linear(*shape, setup)
        x = torch.randn(1, TOKENS, shape[0], dtype=DTYPES[setup.dtype], requires_grad=True)
        rows.append(measure(holder, setup, x, rounds, f"{shape[0]}→{shape[1]}"))
    for told, setup, shape in forced_cells(quick):
        holder = linear(*shape, setup)
        x = torch.randn(1, TOKENS, shape[0], dtype=DTYPES[setup.dtype], requires_grad=True)
        with answered(**dataclasses.asdict(told)):
            row = measure(holder, setup, x, rounds, f"{shape[0]}→{shape[1]}")
        rows.append({**row, "group": f"{row['group']}, forced bf16={told.bf16} float32={told.float32}"})
    for group, size, setup, base, x in convolutions.cells(quick):
        rows.append({**measure(base, setup, x, rounds, size), "group": group})
    return {"rows": rows, "means": means(rows)}


def cells(quick: bool) -> Iterator[tuple[Setup, tuple[int, int]]]:
    sizes = [(576, 1536)] if quick else [(576, 576), (576, 1536), (2048, 2048)]
    ranks = [8] if quick else [8, 64]
    kinds = [(False, ranks), (True, [8])] if has_nf4() else [(False, ranks)]
    for nf4, these in kinds:
        for dora, dtype, dropout, rank, size in itertools.product((False, True), DTYPES, (0.0, 0.05), these, sizes):
            yield Setup(rank, dropout, dora, dtype, nf4), size


def forced_cells(quick: bool) -> Iterator[tuple[Answers, Setup, tuple[int, int]]]:
    """The answer that was not measured, at rank 8."""
    mine = answers()
    bf16 = Answers(FLOAT32 if mine.bf16 == NATIVE else NATIVE, mine.float32)
    float32 = Answers(mine.bf16, BLAS if mine.float32 == ONEDNN else ONEDNN)
    for setup, shape in cells(quick):
        if setup.rank == 8 and not setup.nf4 and (setup.dtype == "bf16" or has_onednn()):
            yield (bf16 if setup.dtype == "bf16" else float32), setup, shape


def measure(base: nn.Module, setup: Setup, x: Tensor, rounds: int, size: str) -> Row:
    models = three(base, setup, ["layer"])
    grad = torch.randn_like(models["floor"](x))
    if not setup.dropout:
        _check_agreement(models, x)
    sides = {name: _step(model, x, grad) for name, model in models.items()}
    if not (x.requires_grad or any(p.requires_grad for p in models["floor"].parameters())):
        sides.pop("floor")  # nothing to differentiate
    times = race(sides, rounds, {name: functools.partial(touch, models[name]) for name in sides})
    row: Row = {"case": setup.label, "size": size, **median_ms(times), **ratio(times, "peft", "ours")}
    row["group"] = row["case"].rpartition(" r=")[0]
    return {**row, "tuned_ratio": ratio(times, "tuned", "ours")["ratio"]}


def means(rows: list[Row]) -> dict[str, dict[str, float]]:
    groups = dict.fromkeys(row["group"] for row in rows)
    found = {group: [row["ratio"] for row in rows if row["group"] == group] for group in groups}
    return {group: {"mean": geometric_mean(values), "lowest": min(values)} for group, values in found.items()}


def _step(model: nn.Module, x: Tensor, grad: Tensor) -> Side:
    def step() -> None:
        x.grad = None
        model(x).backward(grad)

    return step


def _check_agreement(models: dict[str, nn.Module], x: Tensor) -> None:
    ours, theirs = models["ours"](x).float(), models["peft"](x).float()
    error = ((ours - theirs).norm() / theirs.norm()).item()
    limit = 1e-5 if x.dtype != torch.bfloat16 else 1e-2
    assert error < limit, f"the two sides do not compute the same: relative difference {error:.2g}"
