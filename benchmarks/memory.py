"""What a layer retains for backward (counted, so the same in every run), and the peak of a whole process."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import torch
from torch import nn

from . import convolutions
from .models import SHAPES, language_model, llama
from .pairs import DTYPES, PROJECTIONS, Setup, has_nf4, linear, three
from .rows import Row

WIDTH, TOKENS = 1024, 512


def run(quick: bool) -> Row:
    rows = [_retained(Setup(8, dropout, dora, dtype, nf4)) for nf4, dora, dtype, dropout in _cases()]
    by_model = [_retained_by_model(Setup(8, 0.0, dora, dtype)) for dora in (False, True) for dtype in DTYPES]
    result: Row = {"rows": rows, "other_layers": list(_retained_elsewhere(quick)), "by_model": by_model}
    if not quick:
        result["peaks"] = [_peaks(what, dtype) for what in ("LoRA", "DoRA", "loss") for dtype in DTYPES]
    return result


def retained_bytes(model: nn.Module, x: torch.Tensor) -> int:
    """Bytes of the storages that autograd holds after forward, the model's own parameters aside."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor too: no address may be used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    del out
    return sum(size for size, _ in held.values())


def _cases() -> itertools.product[tuple[bool, bool, str, float]]:
    return itertools.product((False, True)[: 1 + has_nf4()], (False, True), DTYPES, (0.0, 0.05))


def _retained(setup: Setup) -> Row:
    x = torch.randn(TOKENS, WIDTH, dtype=DTYPES[setup.dtype], requires_grad=True)
    models = three(linear(WIDTH, WIDTH, setup), setup, ["layer"])
    found = {name: retained_bytes(models[name], x) for name in ("ours", "peft", "tuned")}
    shares = {f"{name}_of_x": round(size / x.nbytes, 3) for name, size in found.items()}
    return {"case": setup.label, **found, **shares, "share": round(found["ours"] / found["peft"], 3)}


def _retained_by_model(setup: Setup) -> Row:
    """The backbone of the small Llama, where neighbours share what they keep: q, k and v, or gate and up, one input."""
    tokens = torch.randint(0, SHAPES["small"]["vocab_size"], (1, TOKENS))
    models = three(llama("small", setup.dtype), setup, PROJECTIONS)
    for model in models.values():
        table = language_model(model).get_input_embeddings()
        table.register_forward_hook(lambda module, args, out: out.requires_grad_())
    found = {name: retained_bytes(model, tokens) for name, model in models.items()}
    return {
        "case": f"small Llama, {setup.label}, 1×{TOKENS} tokens",
        **found,
        "share": round(found["ours"] / found["peft"], 3),
    }


def _peaks(what: str, dtype: str) -> Row:
    """MiB above what is loaded, each side in a process of its own."""
    other, found = "full" if what == "loss" else "peft", {}
    for side in ("ours", other):
        command = [sys.executable, "-m", "benchmarks.peak", what, side, dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side] = json.loads(done.stdout.splitlines()[-1])
    step = f"small Llama {what} r=8, training step of 2×512 tokens"
    case = "loss head, T=1024 V=49152, half ignored" if what == "loss" else step
    share = round(found["ours"] / found[other], 3)
    return {"case": f"{case}, {dtype}", "ours_mib": found["ours"], "other_mib": found[other], "share": share}


def _retained_elsewhere(quick: bool) -> Iterator[Row]:
    """Convolutions and embeddings."""
    for _, size, setup, base, x in convolutions.cells(quick):
        models = three(base, setup, ["layer"])
        found = {name: retained_bytes(model, x) for name, model in models.items() if name != "tuned"}
        kind = "Conv2d" if x.is_floating_point() else "Embedding"
        yield {"case": f"{kind} {size}, {setup.label}", **found, "share": round(found["ours"] / found["peft"], 3)}
