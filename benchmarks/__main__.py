"""Run the suites and write what they found: `python -m benchmarks [--quick] [suite ...]`."""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
from pathlib import Path

from lora_exp.machine.allocator import keep_freed_memory
from lora_exp.machine.waiting import wait_briefly

wait_briefly()  # before torch is loaded
keep_freed_memory()

import torch  # noqa: E402

from lora_exp.config import MachineConfig  # noqa: E402
from lora_exp.machine.precision import take_precision  # noqa: E402

from . import report  # noqa: E402

SUITES = ("job", "layers", "models", "memory", "startup", "scale", "waiting", "trainers", "serving", "packed")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", choices=[*SUITES, []], help=f"some of {', '.join(SUITES)}; all if left out"
    )
    parser.add_argument("--quick", action="store_true", help="fewer and smaller cases: two minutes")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads (default: all processors)")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/benchmarks"), help="folder of RESULTS.md and results.json"
    )
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    precision = take_precision(MachineConfig(), torch.device("cpu"))  # asked of the machine once, for all suites
    logging.disable(logging.WARNING)
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "results.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    for name in asked.suites or SUITES:
        print(f"{name} ...", flush=True)
        before = report.load()
        found = importlib.import_module(f"benchmarks.{name}").run(asked.quick)
        about = {**report.circumstances(precision, asked.quick), "load_before": before, "load_after": report.load()}
        known[name] = {**found, "about": about}
        file.write_text(json.dumps(known, indent=1) + "\n")
        print(report.table(found["rows"]), flush=True)
    report.write(known, asked.out)
    print(f"written: {asked.out / 'RESULTS.md'}, {file}")


if __name__ == "__main__":
    main()
