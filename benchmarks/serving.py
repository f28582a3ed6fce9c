"""Several adapters over one base against as many merged models: memory, switching, and answers a second."""

from __future__ import annotations

import gc
import os
import queue
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from lora_exp.adapters import BASE, LoraConfig, LoraModel
from lora_exp.config import conf_folder
from lora_exp.schema import register, to_config
from lora_exp.use.loading import Trained, load_trained
from lora_exp.use.serving.asked import Asked, Event, Failed, Piece, Sampling
from lora_exp.use.serving.engine import Engine
from lora_exp.use.serving.text import Writer

from .pairs import PROJECTIONS
from .rows import Row
from .timing import Side, median_ms, race, ratio

_PROMPT, _WORDS = 32, 16  # tokens
_ADAPTERS = 4


def run(quick: bool) -> Row:
    """`quick` takes fewer rounds and two merged models."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        served = trained(_ADAPTERS)
        merged = _write(served, folder)
        rows = [_switching(served, folder, merged, 3 if quick else 11)]
        rows += [_throughput(served, each, 1 if quick else 5) for each in (1, 4)]
        return {"rows": rows, "beside": [_memory(folder, 2 if quick else _ADAPTERS)]}


def trained(adapters: int) -> Trained:
    """The packaged SmolLM2-135M in float32, with LoRA of rank 8 on all seven projections as often as asked."""
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        config = to_config(compose("config", ["task=serve", "model.dtype=float32", "tracking=none"]))
    found = load_trained(config)
    for number in range(adapters):
        _add(found, f"adapter_{number}")
    return found


@torch.no_grad()
def _add(found: Trained, name: str) -> None:
    config = LoraConfig(rank=8, lora_alpha=16, target_modules=PROJECTIONS)
    if isinstance(found.model, LoraModel):
        found.model.add_adapter(name, config)
    else:
        found.model = LoraModel(found.model, config, name, verbose=False)
    for parameter in found.model.adapter_parameters(name).values():
        parameter.normal_(std=0.01)
    found.model.eval()


def _write(served: Trained, folder: Path) -> Path:
    """The adapters' folders below ``folder``; the first of them also as a merged model, whose folder is returned."""
    assert isinstance(served.model, LoraModel)
    for name in served.model.configs:
        served.model.save_pretrained(folder / name, name)
    adapted = LoraModel.from_pretrained(trained(0).model, folder / "adapter_0", verbose=False)
    plain: Any = adapted.merge_and_unload()
    plain.save_pretrained(folder / "merged")
    return folder / "merged"


# Memory: processes of their own


def _memory(folder: Path, count: int) -> Row:
    sides = {"base": ["1", "0"], "adapters": ["1", str(count)], "merged": [str(count), "0"]}
    found = {name: _resident_mib([str(folder), *arguments]) for name, arguments in sides.items()}
    row: Row = {"case": f"MiB resident, {count} adapters of rank 8 over one base / {count} merged models, float32"}
    row |= {f"{name}_mib": value for name, value in found.items()}
    return {**row, "ratio": round(found["merged"] / found["adapters"], 2)}


def _resident_mib(arguments: list[str]) -> float:
    done = subprocess.run([sys.executable, "-m", "benchmarks.serving", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return float(done.stdout.split()[-1])


def _hold(folder: Path, models: int, adapters: int) -> None:
    """Prints how many MiB more a process holds, once it has loaded as many models, and adapters on the last of them."""
    import psutil
    from transformers import AutoModelForCausalLM

    process = psutil.Process()
    before = process.memory_info().rss
    held: list[nn.Module] = [_in_memory(AutoModelForCausalLM.from_pretrained(folder / "merged")) for _ in range(models)]
    for number in range(adapters):
        where, name = folder / f"adapter_{number}", f"adapter_{number}"
        if isinstance(held[-1], LoraModel):
            held[-1].load_adapter(where, name)
        else:
            held[-1] = LoraModel.from_pretrained(held[-1], where, name, verbose=False)
    gc.collect()
    print(len(held), round((process.memory_info().rss - before) / 2**20, 1))


def _in_memory(model: nn.Module) -> nn.Module:
    """With weights of its own: a file that is mapped into memory is not counted as a model is that computes."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model


# Time


def _switching(served: Trained, folder: Path, merged: Path, rounds: int) -> Row:
    """From one adapter to another: by a route, by a new adapter's file, by merging, and by a merged model's file."""
    from transformers import AutoModelForCausalLM

    model = served.model
    assert isinstance(model, LoraModel)

    def merge() -> None:
        model.merge("adapter_1")
        model.unmerge()

    sides: dict[str, Side] = {
        "route": partial(model.set_adapter, "adapter_1"),
        "load": partial(model.load_adapter, folder / "adapter_0", "new"),
        "merge": merge,
        "model": lambda: _in_memory(AutoModelForCausalLM.from_pretrained(merged)),
    }

    def tidy() -> None:
        model.set_adapter("adapter_0")
        if "new" in model.configs:
            model.delete_adapter("new")

    times = race(sides, rounds, dict.fromkeys(sides, tidy))
    tidy()
    row: Row = {
        "case": "ms to switch to another adapter: chosen, loaded from its folder, merged and unmerged / a model"
    }
    return {**row, **median_ms(times), **ratio(times, "model", "load")}


def _throughput(served: Trained, each: int, rounds: int) -> Row:
    """``each`` requests for each of four adapters, all answered together, and an adapter after the other."""
    names = [f"adapter_{number}" for number in range(_ADAPTERS) for _ in range(each)]
    with _engine(served, len(names)) as engine:
        groups = [[name] * each for name in dict.fromkeys(names)]
        sides: dict[str, Side] = {
            "together": lambda: _answer(engine, names),
            "in_turn": lambda: _in_turn(engine, groups),
            "one_adapter": lambda: _answer(engine, ["adapter_0"] * len(names)),
            "base": lambda: _answer(engine, [BASE] * len(names)),
        }
        times = race(sides, rounds)
    found = median_ms(times)
    written = len(names) * _WORDS
    row: Row = {"case": f"4 adapters × {each} requests of {_PROMPT} + {_WORDS} tokens, routed in one batch / in turn"}
    rates = {f"{name}_tokens_per_s": round(written / found[f"{name}_ms"] * 1e3, 1) for name in sides}
    return {**row, **rates, **ratio(times, "in_turn", "together")}


@contextmanager
def _engine(served: Trained, size: int) -> Iterator[Engine]:
    engine = Engine(served, size, size)
    assert isinstance(served.model, LoraModel)
    for name in [BASE, *served.model.configs]:
        engine.admit(name)
    engine.start()
    try:
        yield engine
    finally:
        engine.close(0)
        engine.join(10)


def _in_turn(engine: Engine, groups: Sequence[Sequence[str]]) -> None:
    for group in groups:
        _answer(engine, group)


def _answer(engine: Engine, names: Sequence[str]) -> None:
    heard: queue.Queue[Event] = queue.Queue()
    prompt = list(range(100, 100 + _PROMPT))
    engine.submit([Asked(prompt, name, _WORDS, Writer(str), heard.put, Sampling(0.0)) for name in names])
    running = len(names)
    while running:
        event = heard.get()
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Piece)
        running -= event.finish is not None


if __name__ == "__main__":
    os.environ.setdefault("LORA_EXP_FLOAT32", "blas")
    _hold(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
