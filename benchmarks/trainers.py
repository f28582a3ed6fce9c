"""The default job by each trainer, on our adapters and on PEFT's: a process each, in turns."""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path

from .job import DTYPES, finished, ours, own_cache
from .rows import Row
from .timing import ratio

SIDES = {
    "native": [],
    "native_peft": ["backend=peft"],
    "hf": ["trainer=hf"],
    "hf_peft": ["trainer=hf", "backend=peft"],
}
TOKENS = 4 * 128  # an optimizer step of the default job


def run(quick: bool) -> Row:
    """`quick` has two turns of three steps each, in float32."""
    steps, turns, dtypes = (3, 2, ["float32"]) if quick else (12, 3, list(DTYPES))
    with tempfile.TemporaryDirectory() as name:
        cache = own_cache(Path(name) / "cache")
        return {"rows": [_row(Path(name) / label, cache, label, list(SIDES), steps, turns) for label in dtypes]}


def _row(folder: Path, cache: Path, label: str, sides: list[str], steps: int, turns: int) -> Row:
    """`ratio` is the steps' alone, PEFT under transformers' Trainer over all ours; `whole_ratio` is the processes'."""
    folder.mkdir()
    store = f"sqlite:///{folder}/mlflow.db"
    finished(_command(folder / "first", store, cache, label, "native", 2))  # makes caches and the database
    step: dict[str, list[float]] = {side: [] for side in sides}
    whole: dict[str, list[float]] = {side: [] for side in sides}
    for turn in range(turns):
        for place in range(len(sides)):
            side = sides[(place + turn) % len(sides)]
            out = folder / f"{side}{turn}"
            whole[side].append(finished(_command(out, store, cache, label, side, steps)))
            step[side].append(_step_seconds(out / "metrics.jsonl"))
    row: Row = {"case": f"default job, {label}, {steps} steps", "turns": turns, **ratio(step, "hf_peft", "native")}
    row["whole_ratio"] = ratio(whole, "hf_peft", "native")["ratio"]
    return {**row, **{f"{side}_step_s": round(statistics.median(values), 3) for side, values in step.items()}}


def _command(out: Path, store: str, cache: Path, label: str, side: str, steps: int) -> list[str]:
    few = ["train.eval_blocks=4", f"train.eval_every={steps}"]
    return [*ours(out, store, cache, label, steps)[:-1], *few, *SIDES[side]]


def _step_seconds(metrics: Path) -> float:
    """The median of a run's steps but the first, which pays for what is made once."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    rates: list[float] = [record["train/tokens_per_s"] for record in records if "train/tokens_per_s" in record]
    return statistics.median(TOKENS / rate for rate in rates[1:])
