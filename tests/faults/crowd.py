"""Many processes that begin at once on one new tracking store: no point is lost, and nobody falls over the tables.

    python tests/faults/crowd.py [--store sqlite|postgresql] [--processes 8] [--steps 40]

Each process is a sweep of two jobs of a tiny model, its seeds its own. Prints what was found and exits with 1 if a
process failed, a run is missing or unfinished, or a point of a metrics.jsonl is not in the store exactly once. What
PostgreSQL needs is said in stores.py.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stores import tiny_training, tracking_store

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="crowd-") as name, tracking_store(given.store, Path(name)) as store:
        began, folder = time.monotonic(), Path(name)
        problems = _crowd(folder, store, given.processes, given.steps)
        points, found = _compared(folder, store)
    problems += found
    said = "; ".join(problems) or "none lost, none twice"
    print(f"{given.store}, {given.processes} processes: {points} points in {time.monotonic() - began:.0f} s: {said}")
    sys.exit(bool(problems))


def _crowd(folder: Path, store: str, processes: int, steps: int) -> list[str]:
    """Start them all, and wait for all."""
    environment = {**os.environ, "MLFLOW_TRACKING_URI": store, "PYTHONPATH": _path(), "HF_HUB_OFFLINE": "1"}
    common = [sys.executable, "-m", "lora_exp", "-m", *tiny_training(folder, steps)]
    started = []
    for number in range(processes):
        command = [*common, f"seed={2 * number},{2 * number + 1}", f"hydra.sweep.dir=sweep{number}"]
        with (folder / f"shown{number}").open("w") as shown:
            started.append(subprocess.Popen(command, cwd=folder, env=environment, stdout=shown, stderr=shown))
    codes = [process.wait(1800) for process in started]
    return [
        f"process {number} exited with {code}: {(folder / f'shown{number}').read_text()[-400:]}"
        for number, code in enumerate(codes)
        if code
    ]


def _compared(folder: Path, store: str) -> tuple[int, list[str]]:
    """How many points there are, and what the store has otherwise than the jobs' files."""
    from mlflow.tracking import MlflowClient

    client, points, found = MlflowClient(store), 0, list[str]()
    experiments = client.search_experiments()
    runs = client.search_runs([each.experiment_id for each in experiments])
    unfinished = [run.info.run_name for run in runs if run.info.status != "FINISHED"]
    found += [f"{len(unfinished)} runs are not FINISHED"] if unfinished else []
    files = sorted(folder.glob("sweep*/*/metrics.jsonl"))
    sweeps = len(list(folder.glob("sweep*")))
    if len(runs) != len(files) + sweeps:
        found.append(f"{len(runs)} runs for {len(files)} jobs of {sweeps} sweeps")
    for file in files:
        outcome = json.loads((file.parent / "result.json").read_text())
        records = [json.loads(line) for line in file.read_text().splitlines()]
        for name in sorted({name for record in records for name in record} - {"step", "lane"}):
            wanted = sorted(record["step"] for record in records if name in record)
            history = client.get_metric_history(outcome["result"]["run_id"], name)
            points += len(wanted)
            if sorted(point.step for point in history) != wanted:
                found.append(f"{file.parent.name} of {file.parents[1].name}, {name}: {len(history)} of {len(wanted)}")
    return points, found


def _path() -> str:
    """This checkout before whatever else is on the path (psycopg2)."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))


if __name__ == "__main__":
    main()
