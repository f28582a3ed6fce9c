"""The harness itself on the device: one command, and one that is gone on with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from .checks import Case, LeftOut
from .models import llama

_TEXT = " ".join(f"In the beginning was the word {word}, and it was counted {word % 7} times." for word in range(600))


def cases(device: torch.device) -> Iterator[Case]:
    yield "python -m lora_exp: the losses of the CPU, fp32", 1e-3, partial(_as_on_the_cpu, device)
    yield "hydra/launcher=packed, lanes in one pass: the losses of the CPU alone, fp32", 1e-4, partial(_packed, device)
    for dtype in ("bfloat16", "float16"):
        yield f"python -m lora_exp in {dtype}: the loss falls", 0.0, partial(_falls, dtype, device)


def _as_on_the_cpu(device: torch.device) -> float:
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(Path(folder))
        ours, theirs = (_run(Path(folder), where, "float32") for where in (str(device), "cpu"))
    return max(abs(ours[key] - theirs[key]) for key in ("first", "last"))


def _falls(dtype: str, device: torch.device) -> float:
    if dtype == "float16" and device.type == "cpu":
        raise LeftOut("float16 trains on a GPU only")
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(Path(folder))
        found = _run(Path(folder), str(device), dtype)
    return max(0.0, found["last"] - found["first"])


def _packed(device: torch.device) -> float:
    joined = ["hydra/launcher=packed", "hydra.launcher.lanes=3", "hydra.launcher.passes=joined"]
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(Path(folder))
        together = _sweep(Path(folder) / "together", str(device), joined)
        alone = _sweep(Path(folder) / "alone", "cpu", [])
    return max(abs(ours - theirs) for ours, theirs in zip(together, alone, strict=True))


def _sweep(place: Path, device: str, launcher: list[str]) -> list[float]:
    """The last losses of ranks 2, 4 and 8, at a rate that does not blow up differences of rounding."""
    own = [f"hydra.sweep.dir={place}", "sweep.reuse=false", "optimizer.lr=1e-3"]
    _done([*_command(place.parent, device, "float32"), "-m", "rank=2,4,8", *launcher, *own])
    return [_losses(place / str(number))["last"] for number in range(3)]


def _write_inputs(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = {letter: index for index, letter in enumerate(["<unk>", *pre_tokenizers.ByteLevel.alphabet()])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder / "model")
    llama().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(_TEXT)


def _run(folder: Path, device: str, dtype: str) -> dict[str, float]:
    place = folder / f"{device.replace(':', '_')}-{dtype}"
    _done([*_command(folder, device, dtype), f"hydra.run.dir={place}"])
    return _losses(place)


def _command(folder: Path, device: str, dtype: str) -> list[str]:
    return [
        sys.executable, "-m", "lora_exp", "model=hf", f"model.path={folder / 'model'}", "data=text",
        f"data.path={folder / 'text.txt'}", "data.block_size=32", f"device={device}", f"model.dtype={dtype}",
        "tracking=none", "train.steps=20", "train.eval_every=10", "optimizer.lr=1e-2",
    ]  # fmt: skip


def _done(command: list[str]) -> None:
    done = subprocess.run(command, env=dict(os.environ), capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")


def _losses(place: Path) -> dict[str, float]:
    result = json.loads((place / "result.json").read_text())["result"]
    return {"first": result["eval_loss_before"], "last": result["eval_loss"]}
