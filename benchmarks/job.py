"""The whole default job against a plain PEFT + Trainer script that does the same, and beside a busy process."""

from __future__ import annotations

import itertools
import os
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_exp.machine.cache import cache_root

from .rows import Row
from .timing import ratio

DTYPES = {"float32": "float32", "bf16": "bfloat16"}
TURNS = 5
_BUSY = "while True: pass"


def run(quick: bool) -> Row:
    """Both sides take turns, one process each; `quick` has two steps and two turns."""
    steps, turns = (2, 2) if quick else (24, TURNS)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cache = own_cache(folder / "cache")
        rows = [_against_peft(folder / label, cache, label, steps, turns) for label in DTYPES]
        return {"rows": rows, "beside": _beside_busy(folder / "busy", cache, steps, turns)}


def own_cache(cache: Path) -> Path:
    """A cache that holds one data set, the default job's, whatever else was trained on this machine."""
    cache.mkdir()
    for kind in ("models", "machine"):
        shared = cache_root(None) / kind
        shared.mkdir(parents=True, exist_ok=True)
        (cache / kind).symlink_to(shared)
    return cache


def _against_peft(folder: Path, cache: Path, label: str, steps: int, turns: int) -> Row:
    folder.mkdir()
    store = f"sqlite:///{folder}/mlflow.db"
    times: dict[str, list[float]] = {"ours": [], "peft": []}
    finished(ours(folder / "first", store, cache, label, 2))  # makes caches and the database
    for turn in range(turns):
        for side in ("ours", "peft") if turn % 2 else ("peft", "ours"):
            command = (ours if side == "ours" else peft_trainer)(folder / f"{side}{turn}", store, cache, label, steps)
            times[side].append(finished(command))
    row: Row = {"case": f"default job, {label}, {steps} steps", "turns": turns}
    row |= {f"{side}_s": round(statistics.median(values), 1) for side, values in times.items()}
    return {**row, **ratio(times, "peft", "ours"), **phases(folder / "mlflow.db")}


def _beside_busy(folder: Path, cache: Path, steps: int, turns: int) -> list[Row]:
    """The job in what the machine is fast in, alone and beside a process that keeps one core busy."""
    folder.mkdir()
    store = f"sqlite:///{folder}/mlflow.db"
    times: dict[str, list[float]] = {"alone": [], "busy": []}
    for turn in range(max(1, turns // 2)):
        times["alone"].append(finished(ours(folder / f"alone{turn}", store, cache, "auto", steps)))
        with busy_process():
            times["busy"].append(finished(ours(folder / f"busy{turn}", store, cache, "auto", steps)))
    row: Row = {"case": "default job (auto) beside a busy process / alone"}
    row |= {f"{side}_s": round(statistics.median(values), 1) for side, values in times.items()}
    return [{**row, "ratio": round(statistics.median(times["busy"]) / statistics.median(times["alone"]), 3)}]


def ours(folder: Path, store: str, cache: Path, label: str, steps: int) -> list[str]:
    overrides = [f"model.dtype={DTYPES.get(label, label)}", f"tracking.uri={store}", f"hydra.run.dir={folder}"]
    overrides += [f"model.cache_dir={cache}", f"data.cache_dir={cache}", f"train.steps={steps}"]
    return ["-m", "lora_exp", *overrides, f"train.eval_every={steps // 2}"]


def peft_trainer(folder: Path, store: str, cache: Path, label: str, steps: int) -> list[str]:
    names = ("models", "smollm2_135m-*"), ("datasets", "bible-*")
    model, blocks = (next(entry for entry in (cache / kind).glob(name) if entry.is_dir()) for kind, name in names)
    return ["-m", "benchmarks.peft_trainer", str(folder), store, str(model), str(blocks), DTYPES[label], str(steps)]


def finished(arguments: list[str]) -> float:
    """Seconds from start to end of a process."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return time.perf_counter() - started


@contextmanager
def busy_process() -> Iterator[None]:
    """Something else that wants a core."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY], env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        yield
    finally:
        process.kill()
        process.wait()


def phases(database: Path) -> dict[str, float]:
    """Median seconds of training, by the times at which both sides logged their losses, and of all the rest."""
    keys = "'train/loss', 'loss', 'eval/loss', 'eval_loss'"
    query = f"SELECT run_uuid, key, timestamp FROM metrics WHERE key IN ({keys})"
    found: dict[str, dict[str, list[float]]] = {}
    with sqlite3.connect(database) as connection:
        for run, key, when in connection.execute(query):
            side = "ours" if "/" in key else "peft"
            logged = found.setdefault(f"{side} {run}", {"eval": [], "train": []})
            logged["eval" if "eval" in key else "train"].append(when)
    seconds: dict[str, list[float]] = {}
    for name, logged in found.items():
        seconds.setdefault(name.split()[0], []).append(_training_seconds(logged))
    return {f"{side}_training_s": round(statistics.median(values), 1) for side, values in seconds.items()}


def _training_seconds(logged: dict[str, list[float]]) -> float:
    """From each evaluation's end to the last step before the next, evaluations left out."""
    evaluated, trained = sorted(logged["eval"]), sorted(logged["train"])
    stretches = itertools.pairwise(evaluated)
    last = [max((when for when in trained if start <= when <= end), default=start) - start for start, end in stretches]
    return sum(last) / 1e3
