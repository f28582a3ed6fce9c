"""A tracking server that goes away in the middle of a training: no step waits for it, and no point is missing.

    python tests/faults/outages.py [--store sqlite|postgresql] [--away_s 20] [--steps 1500]

Starts MLflow's own server on 127.0.0.1, trains a tiny model, kills the server in mid-run, and

- stopped: starts it again after ``--away_s`` seconds;
- silent: lets a socket that accepts and never answers take its place until the training has ended; then starts the
  server again and calls ``task=sync``.

Prints a line a trial and exits with 1 if one fails. What PostgreSQL needs is said in stores.py.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from stores import free_port, tiny_training, tracking_store

ROOT = Path(__file__).parents[2]
CHILD = """
import json, sys, time
from pathlib import Path
from lora_exp.tracking.tracked import MlflowRun
longest, kept = [0.0], MlflowRun.put
def put(self, entry):
    began = time.monotonic()
    kept(self, entry)
    longest[0] = max(longest[0], time.monotonic() - began)
    time.sleep(0.03)  # or a fast machine has ended its training before the server is back
MlflowRun.put = put
from lora_exp.__main__ import main
try:
    main()
finally:
    Path("longest.json").write_text(json.dumps(longest[0]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--away_s", type=float, default=20)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--trial", choices=["stopped", "silent"], action="append")
    given = parser.parse_args()
    problems = []
    for trial in given.trial or ["stopped", "silent"]:
        with (
            tempfile.TemporaryDirectory(prefix="outages-") as folder,
            tracking_store(given.store, Path(folder)) as store,
        ):
            found = _trial(trial, Path(folder), store, given.away_s, given.steps)
            problems += found
            print(f"{given.store}, {trial}: {'; '.join(found) or 'as it must be'}", flush=True)
    sys.exit(bool(problems))


def _trial(trial: str, folder: Path, store: str, away_s: float, steps: int) -> list[str]:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = _server(store, folder, port)
    environment = {**os.environ, "MLFLOW_TRACKING_URI": address, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CHILD, *tiny_training(folder, steps), "hydra.run.dir=job"]
    with (folder / "shown").open("w") as shown:
        training = subprocess.Popen(command, cwd=folder, env=environment, stdout=shown, stderr=shown)
    lines = folder / "job/metrics.jsonl"
    try:
        _until(lambda: _count(lines) > steps / 4, training)
        _kill(server)
        before = _count(lines)
        if trial == "silent":
            with _silence(port):
                training.wait(600)
            server = _server(store, folder, port)
            sync = [sys.executable, "-m", "lora_exp", "task=sync", "run=job"]
            synced = subprocess.run(sync, cwd=folder, env=environment, capture_output=True, text=True)
            print("  " + synced.stdout.strip().replace("\n", "\n  "))
        else:
            time.sleep(away_s)
            server = _server(store, folder, port)
        during = _count(lines) - before
        training.wait(600)
        print(f"  {during} lines written while it was away, in all {_count(lines)}")
        return [*_problems(folder, address, steps), *([] if during else ["nothing was trained meanwhile"])]
    finally:
        training.kill()
        training.wait()
        _kill(server)
        print("  " + "\n  ".join(line for line in (folder / "shown").read_text().splitlines() if "MLflow" in line))


def _problems(folder: Path, address: str, steps: int) -> list[str]:
    from mlflow.tracking import MlflowClient

    outcome = json.loads((folder / "job/result.json").read_text())
    longest = json.loads((folder / "longest.json").read_text())
    print(f"  {outcome['status']}; the longest that anything waited for tracking: {longest * 1000:.1f} ms")
    client = MlflowClient(address)
    run = client.get_run(outcome["result"]["run_id"])
    records = [json.loads(line) for line in (folder / "job/metrics.jsonl").read_text().splitlines()]
    found = [] if run.info.status == outcome["status"] == "FINISHED" else [f"{run.info.status}, {outcome['status']}"]
    for name in sorted({name for record in records for name in record} - {"step", "lane"}):
        wanted = sorted((record["step"], float(record[name])) for record in records if name in record)
        stored = sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, name))
        if [step for step, _ in stored] != [step for step, _ in wanted]:
            found.append(f"{name}: {len(stored)} points for {len(wanted)}")
        elif any(abs(one - other) > 1e-12 * abs(other) for (_, one), (_, other) in zip(stored, wanted, strict=True)):
            found.append(f"{name}: other values")
    if longest > 1:
        found.append(f"something waited {longest:.1f} s")
    if len(records) < steps:
        found.append(f"{len(records)} records")
    files = {file.path for file in client.list_artifacts(run.info.run_id)}
    missing = {"adapter", "config.yaml", "metrics.jsonl"} - files
    return [*found, *([f"without {sorted(missing)}"] if missing else [])]


def _server(store: str, folder: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--artifacts-destination", str(folder / "artifacts")]
    quiet = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "server").open("a") as log:
        process = subprocess.Popen(command, env=quiet, stdout=log, stderr=log, start_new_session=True)
    _until(lambda: _answers(port), process)
    return process


def _kill(server: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _answers(port: int) -> bool:
    import urllib.request

    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).status == 200)
    except OSError:
        return False


@contextlib.contextmanager
def _silence(port: int) -> Iterator[None]:
    """A socket that takes every connection and says nothing."""
    with socket.socket() as ear:
        ear.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        for _ in range(100):  # a worker of the server that was killed may hold the port for a moment
            with contextlib.suppress(OSError):
                ear.bind(("127.0.0.1", port))
                break
            time.sleep(0.1)
        ear.listen(512)
        yield


def _until(is_so: object, process: subprocess.Popen[bytes], at_most_s: float = 300) -> None:
    assert callable(is_so)
    began = time.monotonic()
    while not is_so():
        if process.poll() is not None or time.monotonic() - began > at_most_s:
            sys.exit(f"{process.args!r} did not come so far (exit {process.poll()})")
        time.sleep(0.1)


def _count(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


if __name__ == "__main__":
    main()
