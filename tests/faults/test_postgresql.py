"""Processes that begin at once on a new PostgreSQL take turns in making MLflow's tables (all of it: crowd.py)."""

from __future__ import annotations

import runpy
import shutil
import tempfile
import threading
from pathlib import Path

import pytest

from lora_exp.tracking import database


@pytest.mark.skipif(
    not (shutil.which("pg_ctl") or list(Path("/usr/lib/postgresql").glob("*/bin"))), reason="PostgreSQL not installed"
)
def test_the_second_waits_for_the_first() -> None:
    pytest.importorskip("psycopg2")
    tracking_store = runpy.run_path(str(Path(__file__).with_name("stores.py")))["tracking_store"]
    entered = threading.Event()

    def second(uri: str) -> None:
        with database.one_at_a_time(uri):
            entered.set()

    with tempfile.TemporaryDirectory() as folder, tracking_store("postgresql", Path(folder)) as uri:
        with database.one_at_a_time(uri):
            waiting = threading.Thread(target=second, args=(uri,))
            waiting.start()
            assert not entered.wait(1)
        assert entered.wait(20)
        waiting.join()
