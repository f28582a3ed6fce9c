"""What the wait of torch's threads costs: alone, and beside something else that wants a core."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys

from lora_exp.machine.waiting import WAITS, wait_briefly

from .job import busy_process
from .rows import Row

POLICIES: dict[str, dict[str, str]] = {"ours": {}, "default": {}, "passive": {"OMP_WAIT_POLICY": "PASSIVE"}}
MODELS = ("small", "SmolLM2-135M")


def run(quick: bool) -> Row:
    turns, cases = (1, MODELS[:1]) if quick else (4, MODELS)
    return {"rows": [_row(name, is_busy, turns) for name in cases for is_busy in (False, True)]}


def _row(name: str, is_busy: bool, turns: int) -> Row:
    steps: dict[str, list[float]] = {policy: [] for policy in POLICIES}
    for _ in range(turns):
        for policy in POLICIES:
            with busy_process() if is_busy else contextlib.nullcontext():
                steps[policy] += _steps(name, policy)
    medians = {f"{policy}_ms": round(statistics.median(values) * 1e3, 1) for policy, values in steps.items()}
    best = {f"{policy}_best_ms": round(min(values) * 1e3, 1) for policy, values in steps.items()}
    place = "beside a busy process" if is_busy else "alone"
    return {"case": f"{name}, LoRA fp32 r=8, 1×256 tokens, {place}", **medians, **best}


def _steps(name: str, policy: str) -> list[float]:
    environment = {key: value for key, value in os.environ.items() if key not in WAITS}
    command = [sys.executable, "-m", "benchmarks.waiting", name, "20" if name == "small" else "4", policy]
    done = subprocess.run(command, env=environment | POLICIES[policy], capture_output=True, text=True, check=True)
    found: list[float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(name: str, steps: str, policy: str) -> None:
    """One process's seconds a step, as JSON."""
    if policy == "ours":
        wait_briefly()
    from .models import llama, training_step
    from .pairs import PROJECTIONS, Setup, three
    from .timing import race

    model = three(llama(name, "fp32"), Setup(), PROJECTIONS)["ours"]
    print(json.dumps(race({"step": training_step(model, 1, 256, True)}, int(steps))["step"]))


if __name__ == "__main__":
    main(*sys.argv[1:])
