"""Sweeps that nobody ran: folders as jobs leave them, with results that follow a formula."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lora_exp.job import METRICS_FILE, SWEPT_FILE, Outcome, PlanResult, Result, write_outcome

EVALUATIONS = (0, 12, 24, 36)


@pytest.fixture
def made_up() -> SimpleNamespace:
    """What makes them, and the formula."""
    return SimpleNamespace(sweep=sweep, job=job, plans=plans, loss_of=loss_of)


def sweep(folder: Path, *, swept: dict[str, list[Any]], failing: tuple[int, ...] = (), accuracy: bool = False) -> Path:
    """A job for each combination of ``swept``; those numbered ``failing`` end after their second evaluation."""
    for number, values in enumerate(itertools.product(*swept.values())):
        job(folder, number, dict(zip(swept, values, strict=True)), number in failing, accuracy)
    (folder / SWEPT_FILE).write_text(json.dumps(list(swept)))
    return folder


def job(folder: Path, number: int, values: dict[str, Any], fails: bool = False, accuracy: bool = False) -> None:
    place = folder / str(number)
    place.mkdir(parents=True)
    loss = loss_of(values)
    records = []
    for step in EVALUATIONS[:2] if fails else EVALUATIONS:
        share = step / EVALUATIONS[-1]
        record = {"lane": "default", "step": step, "eval/loss": 4 + (loss - 4) * share}
        records.append(record | ({"eval/accuracy": share * accuracy_of(values)} if accuracy else {}))
        records.append({"lane": "default", "step": step + 1, "train/loss": 4 - share})
    (place / METRICS_FILE).write_text("\n".join(map(json.dumps, records)) + '\n{"cut')
    every = {"seed": 0, "model": "m", "rank": 8, **values}
    every["scale"] = 16 / (every["rank"] or 8)
    if fails:
        reason = "eval/loss became nan at optimizer step 13 (lane default):\nlower optimizer.lr | it is <b>high</b>"
        write_outcome(place, Outcome(number, "FAILED", [], every, None, reason))
        return
    rank = every["rank"] or 0
    metrics = {"perplexity": math.exp(loss)} | ({"accuracy": accuracy_of(values)} if accuracy else {})
    result = Result(
        loss, 4.0, metrics, 1000 * rank + 1, 10**6, 4096 * rank, 0.5 + rank / 100, 12.0 + number / 10, "adapter", None
    )
    write_outcome(place, Outcome(number, "FINISHED", [], every, result))


def plans(folder: Path, ranks: list[int]) -> Path:
    for number, rank in enumerate(ranks):
        (folder / str(number)).mkdir(parents=True)
        result = PlanResult(
            1000 * rank, 10**6, 4096, 1, rank / 64, 0, 0, 1, 1, 3 + rank / 64, 1, 1, None, None, None, None
        )
        write_outcome(folder / str(number), Outcome(number, "FINISHED", [], {"task": "plan", "rank": rank}, result))
    (folder / SWEPT_FILE).write_text('["rank"]')
    return folder


def loss_of(values: dict[str, Any]) -> float:
    """Best at lr 1e-3, better with rank and with dora, shaken by the seed."""
    rank, lr = values.get("rank") or 8, values.get("optimizer.lr", 1e-3)
    bonus = {"dora": 0.1, "lora": 0.0}.get(str(values.get("adapter")), 0.05)
    shaken = 0.02 * (values.get("seed", 0) % 3) + 0.001 * len(str(values))
    return 2.5 - 0.1 * math.log2(rank) - bonus + 0.2 * abs(math.log10(lr) + 3) + shaken


def accuracy_of(values: dict[str, Any]) -> float:
    return 1 - loss_of(values) / 4
