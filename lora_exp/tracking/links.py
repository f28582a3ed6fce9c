"""Addresses in MLflow's pages that open on the runs, and what to type where nothing serves them yet."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import urlsplit

from lora_exp.tracking.provenance import redacted

UI_ADDRESS = "http://127.0.0.1:5000"
_TRAINING = "?workflowType=machine_learning"  # without it MLflow opens on its pages for language-model applications


def runs_address(server: str, experiment_id: str) -> str:
    """Where a browser finds an experiment's runs."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs{_TRAINING}"


def run_address(server: str, experiment_id: str, run_id: str) -> str:
    """Where a browser finds one run."""
    return f"{server.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}{_TRAINING}"


def where_to_look(uri: str, experiment_id: str, run_id: str) -> str:
    """One line for the terminal: a run's address and, if no server answers at ``uri``, the command that starts one."""
    if urlsplit(uri).scheme in ("http", "https"):
        return f"MLflow {run_address(redacted(uri), experiment_id, run_id)}"
    return f"MLflow {run_address(UI_ADDRESS, experiment_id, run_id)} (served by: {redacted(_serving(uri))})"


def _serving(uri: str) -> str:
    default = Path("outputs/mlflow.db").resolve()
    if uri.startswith("sqlite:///") and Path(uri.removeprefix("sqlite:///")).resolve() == default:
        return "make ui" if "MAKELEVEL" in os.environ else "python -m lora_exp.tracking.ui"
    return f"python -m lora_exp.tracking.ui {uri}"
