"""Sweeps: the packed launcher against fresh processes, PEFT on a kept base, and Hydra's basic launcher.

Every side trains the same jobs and logs them to MLflow; a side is whole processes, from their start to their end.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .job import DTYPES, own_cache
from .rows import Row

Measured = tuple[float, float]  # seconds, and the peak of resident memory of the largest process, in GiB
RANKS, RATES = (4, 8, 16, 32), (1e-3, 5e-4)
_SHORT_RATES = (2e-3, 1e-3, 5e-4, 2e-4)


@dataclass(frozen=True)
class Sweep:
    """``jobs`` are all combinations of ranks and learning rates, of ``rows`` blocks of ``tokens`` a step."""

    name: str
    label: str
    steps: int
    rows: int
    tokens: int
    ranks: Sequence[int] = RANKS
    rates: Sequence[float] = RATES
    evaluated: int = 32

    @property
    def jobs(self) -> list[tuple[int, float]]:
        return [(rank, rate) for rank in self.ranks for rate in self.rates]


def run(quick: bool) -> Row:
    """`quick` has two jobs of two steps, a turn each, and 20 tiny jobs."""
    turns = 1 if quick else 3
    if quick:
        sweeps = [_few(Sweep("default", "bf16", 2, 4, 128)), _few(Sweep("short", "bf16", 2, 1, 16))]
    else:
        sweeps = [Sweep(label, label, 24, 4, 128) for label in DTYPES]
        sweeps.append(Sweep("short", "bf16", 24, 1, 16, rates=_SHORT_RATES))
    with tempfile.TemporaryDirectory() as name:
        rows = [_row(Path(name) / sweep.name, sweep, turns) for sweep in sweeps]
        return {"rows": rows, "growth": [_growth(Path(name) / "growth", 20 if quick else 200)]}


def _few(sweep: Sweep) -> Sweep:
    return replace(sweep, ranks=RANKS[:2], rates=RATES[:1], evaluated=4)


def _row(folder: Path, sweep: Sweep, turns: int) -> Row:
    """Medians of the sides' seconds, in turns; `over_…` is ours over theirs."""
    folder.mkdir()
    place = _Place(folder, own_cache(folder / "cache"), sweep)
    place.measured([_ours(place, "first", ["train.steps=1"])])  # makes caches and the database
    alone = place.measured([_ours(place, "alone", [f"rank={max(sweep.ranks)}"])])
    found: dict[str, list[Measured]] = {side: [] for side in _SIDES}
    for turn in range(turns):
        for index in range(len(_SIDES)):
            side = list(_SIDES)[(index + turn) % len(_SIDES)]
            found[side].append(place.measured(_SIDES[side](place, f"{side}{turn}")))
    seconds = {side: statistics.median(wall for wall, _ in each) for side, each in found.items()}
    peak = max(memory for _, memory in found["packed"])
    what = f"{len(sweep.jobs)} jobs, {sweep.label}, {sweep.steps} steps of {sweep.rows} × {sweep.tokens} tokens"
    row: Row = {"case": what, "turns": turns, **{f"{side}_s": round(value, 1) for side, value in seconds.items()}}
    row |= {f"over_{side}": round(seconds["packed"] / seconds[side], 3) for side in _SIDES if side != "packed"}
    return {**row, "peak_gib": round(peak, 2), "peak_over_one": round(peak / alone[1], 3)}


@dataclass(frozen=True)
class _Place:
    folder: Path
    cache: Path
    sweep: Sweep

    @property
    def store(self) -> str:
        return f"sqlite:///{self.folder}/mlflow.db"

    def measured(self, commands: Sequence[list[str]]) -> Measured:
        started, peaks = time.perf_counter(), []
        for command in commands:
            peaks.append(_peak_gib(command, self.folder / "log.txt"))
        return time.perf_counter() - started, max(peaks)

    def files(self) -> list[str]:
        """The unpacked model and the tokenised blocks."""
        names = ("models", "smollm2_135m-*"), ("datasets", "bible-*")
        return [str(next(e for e in (self.cache / kind).glob(name) if e.is_dir())) for kind, name in names]


def _ours(place: _Place, name: str, overrides: Sequence[str], multirun: bool = False) -> list[str]:
    sweep, folder = place.sweep, place.folder / name
    given = [f"model.dtype={DTYPES[sweep.label]}", f"tracking.uri={place.store}", f"train.steps={sweep.steps}"]
    given += [f"model.cache_dir={place.cache}", f"data.cache_dir={place.cache}", f"data.block_size={sweep.tokens}"]
    given += [f"train.micro_batch_size={sweep.rows}", f"train.eval_every={max(1, sweep.steps // 2)}"]
    given += [f"train.eval_blocks={sweep.evaluated}", "sweep.reuse=false"]  # a later turn does the work again
    where = [f"hydra.sweep.dir={folder}", "-m"] if multirun else [f"hydra.run.dir={folder}"]
    return ["-m", "lora_exp", *given, *overrides, *where]


def _swept(place: _Place, name: str, *more: str) -> list[list[str]]:
    ranks, rates = (",".join(map(str, values)) for values in (place.sweep.ranks, place.sweep.rates))
    return [_ours(place, name, [f"rank={ranks}", f"optimizer.lr={rates}", *more], multirun=True)]


def _fresh(place: _Place, name: str) -> list[list[str]]:
    """A process of PEFT and transformers' Trainer for each job."""
    found = []
    for number, (rank, rate) in enumerate(place.sweep.jobs):
        folder = str(place.folder / f"{name}_{number}")
        found.append(_peft(place, folder, [(rank, rate)]))
    return found


def _kept(place: _Place, name: str) -> list[list[str]]:
    """One process of PEFT for all jobs, on a base that it keeps."""
    return [_peft(place, str(place.folder / name), place.sweep.jobs)]


def _peft(place: _Place, folder: str, jobs: Sequence[tuple[int, float]]) -> list[str]:
    sweep = place.sweep
    asked = json.dumps({"steps": sweep.steps, "rows": sweep.rows, "evaluated": sweep.evaluated, "jobs": jobs})
    return ["-m", "benchmarks.peft_kept", folder, place.store, *place.files(), DTYPES[sweep.label], asked]


_SIDES: dict[str, Callable[[_Place, str], list[list[str]]]] = {
    "packed": lambda place, name: _swept(place, name, "hydra/launcher=packed"),
    "fresh": _fresh,
    "kept": _kept,
    "basic": lambda place, name: _swept(place, name),
}


def _peak_gib(arguments: list[str], out: Path) -> float:
    """The peak of resident memory of a process; runs it to its end."""
    with out.open("wb") as stream:
        process = subprocess.Popen([sys.executable, *arguments], stdout=stream, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        said = out.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}:\n{said}")
    unit = 1 if sys.platform == "darwin" else 1024
    return used.ru_maxrss * unit / 2**30


def _growth(folder: Path, jobs: int) -> Row:
    """Tiny jobs in one packed sweep: what a job costs at the beginning and at the end of it."""
    folder.mkdir()
    model, text = _tiny(folder)
    given = ["model=hf", f"model.path={model}", "model.label=tiny", "data=text", f"data.path={text}"]
    given += ["data.block_size=16", "device=cpu", "train.steps=1", "train.warmup_steps=0", "train.eval_blocks=2"]
    given += ["train.micro_batch_size=1", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"hydra.sweep.dir={folder}/s"]
    given += [f"model.cache_dir={folder}/cache", f"data.cache_dir={folder}/cache"]
    swept = [f"seed={','.join(map(str, range(jobs)))}", "hydra/launcher=packed", "hydra.launcher.lanes=1", "-m"]
    started = time.time()
    peak = _peak_gib(["-m", "lora_exp", *given, *swept], folder / "log.txt")
    ends = sorted((folder / f"s/{number}/result.json").stat().st_mtime for number in range(jobs))
    each = [later - sooner for sooner, later in itertools.pairwise(ends)]
    fourth = max(1, len(each) // 4)
    begin, end = statistics.median(each[:fourth]), statistics.median(each[-fourth:])
    row: Row = {"case": f"{jobs} tiny jobs of one step", "first_s": round(ends[0] - started, 2)}
    row |= {"job_s": round(statistics.median(each), 3), "growth": round(end / begin, 3)}
    return {**row, "report_s": round(time.time() - ends[-1], 2), "peak_gib": round(peak, 2)}


def _tiny(folder: Path) -> tuple[Path, Path]:
    """A Llama of two small layers with random weights and a tokenizer of letters, and a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = {letter: number for number, letter in enumerate(["<unk>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "model")
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text("\n".join(f"line {number} of a text that is as long as it must be" for number in range(400)))
    return folder / "model", text
