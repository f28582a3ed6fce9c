"""``python -m lora_exp.tracking.ui [URI]`` (``make ui``): MLflow's pages, and the addresses that open on the runs."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
import webbrowser

from lora_exp.config import TrackingConfig
from lora_exp.machine.network import refusal
from lora_exp.tracking.links import runs_address

_HAS_SCREEN = sys.platform in ("darwin", "win32") or "DISPLAY" in os.environ or "WAYLAND_DISPLAY" in os.environ


def main() -> None:
    """Print the address of each experiment's runs, open the newest where there is a screen, and serve until stopped."""
    parser = argparse.ArgumentParser(prog="python -m lora_exp.tracking.ui", description=__doc__)
    parser.add_argument("uri", nargs="?", help="MLflow's store (default: MLFLOW_TRACKING_URI, else outputs/mlflow.db)")
    parser.add_argument("--port", type=int, default=5000)
    parser.add_argument("--no-browser", action="store_true", help="print the addresses alone")
    given = parser.parse_args()
    server = f"http://127.0.0.1:{given.port}"
    if refusal(server) is None:
        sys.exit(f"Port {given.port} is taken, perhaps by MLflow ({server}): choose another one with --port")
    uri, addresses = _addresses(given.uri, server)
    print("\n".join(addresses) or "There are no runs yet: python -m lora_exp makes the first", flush=True)
    if addresses and _HAS_SCREEN and not given.no_browser:
        threading.Thread(target=_open, args=(server, addresses[0].split()[0]), daemon=True).start()
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", uri, "--host", "127.0.0.1"]
    sys.exit(_serve([*command, "--port", str(given.port), "--workers", "1"]))


def _addresses(uri: str | None, server: str) -> tuple[str, list[str]]:
    """The store, and a line for each of its experiments with a run, the one with the newest first."""
    from lora_exp.tracking.client import connect, newest_experiments

    section = TrackingConfig(uri=uri)
    found = newest_experiments(connect(section))
    return section.uri or "", [f"{runs_address(server, number)}  {name}" for number, name in found]


def _serve(command: list[str]) -> int:
    """One worker, without MLflow's job runners for language-model applications: it is for one person's looking."""
    quiet = {"PYTHONWARNINGS": "ignore", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = subprocess.Popen(command, env={**quiet, **os.environ})
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    while True:
        try:
            return server.wait()
        except KeyboardInterrupt:  # the server has it from the terminal, too
            continue


def _open(server: str, address: str) -> None:
    while refusal(server) is not None:
        time.sleep(0.3)
    webbrowser.open(address)


if __name__ == "__main__":
    main()
