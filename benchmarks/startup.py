"""Import, and time from the start of the process to the end of the first training step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from .job import own_cache
from .rows import Row

IMPORTS = {
    "import lora_exp": "lora_exp",
    "import lora_exp.adapters": "lora_exp.adapters",
    "import torch": "torch",
    "import peft": "peft",
}


def run(quick: bool) -> Row:
    times = 2 if quick else 5
    rows: list[Row] = [
        {"case": case, "seconds": _median([_seconds(["-c", f"import {name}"]) for _ in range(times)])}
        for case, name in IMPORTS.items()
    ]
    return {"rows": [*rows, _first_step(times)]}


def _first_step(times: int) -> Row:
    """The default job against PEFT + Trainer: same model, data and MLflow store, all warm; sides take turns."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = own_cache(folder / "cache")
        found: dict[str, list[float]] = {"ours": [], "trainer": []}
        store = f"sqlite:///{folder}/mlflow.db"
        for turn in range(times + 1):
            for side, make in (("ours", _ours), ("trainer", _trainer)):
                seconds = make(folder / f"{side}{turn}", store, cache)
                if turn:  # the first creates caches and the database
                    found[side].append(seconds)
        ours, trainer = _median(found["ours"]), _median(found["trainer"])
    case = "to the end of the first training step: default job / PEFT + Trainer"
    return {"case": case, "seconds": ours, "peft_trainer_seconds": trainer, "share": round(ours / trainer, 3)}


def _ours(folder: Path, store: str, cache: Path) -> float:
    overrides = ["train.steps=1", "train.warmup_steps=0", "train.eval_blocks=1", f"tracking.uri={store}"]
    overrides += [f"model.cache_dir={cache}", f"data.cache_dir={cache}"]
    command = ["-m", "lora_exp", *overrides, f"hydra.run.dir={folder}"]
    return _until(command, lambda: any('"train/loss"' in f.read_text() for f in folder.glob("metrics*")))


def _trainer(folder: Path, store: str, cache: Path) -> float:
    mark = folder / "first_step"
    folder.mkdir()
    names = ("models", "smollm2_135m-*"), ("datasets", "bible-*")
    model, blocks = (next(entry for entry in (cache / kind).glob(name) if entry.is_dir()) for kind, name in names)
    return _until(["-m", "benchmarks.peft_trainer", str(folder), store, str(model), str(blocks)], mark.exists)


def _until(arguments: list[str], is_there: Callable[[], bool]) -> float:
    """Seconds until something is there; the process is then left to end."""
    started = time.perf_counter()
    command = [sys.executable, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    seconds = None
    while seconds is None and process.poll() is None:
        time.sleep(0.01)
        if is_there():
            seconds = time.perf_counter() - started
    _, errors = process.communicate()
    if seconds is None:
        raise RuntimeError(f"{' '.join(arguments)} ended without a training step:\n{errors[-2000:]}")
    return seconds


def _seconds(arguments: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - started


def _median(values: list[float]) -> float:
    return round(statistics.median(values), 2)
