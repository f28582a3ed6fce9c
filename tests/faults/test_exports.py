"""Exports that are stopped: nothing is left of them, or a whole one that was verified."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from lora_exp.export.provenance import damage, read_provenance

Forked = Callable[..., Any]
RUN, TARGET = "outputs/runs/day/run", "outputs/exports/day-run-merged"
TRIALS = int(os.environ.get("TRIALS", "3"))  # more of them by `make torture`
EXPORT = ["task=export", f"run={RUN}", "export=merged", "tracking=none"]


@pytest.fixture
def trained(forked: Forked, tiny_overrides: list[str]) -> Path:
    """The folder that a run was trained in."""
    done = forked(*tiny_overrides, f"hydra.run.dir={RUN}", "tracking=none", "optimizer.lr=2e-2")
    assert done.code == 0, done.err
    return Path(done.folder)


def under_the_name(folder: Path) -> bool:
    """Whether an export stands there; then it must be whole, and verified."""
    target = folder / TARGET
    if not target.exists():
        return False
    facts = read_provenance(target)
    assert damage(target, facts) == []
    assert facts["verification"]["max_logit"] <= 1e-3
    assert (target / "model.safetensors").is_file()
    return True


WHERE = {
    "while loading": "lora_exp.use.loading:_with_runs",
    "while writing": "lora_exp.export.merging:save_plain",
    "while verifying": "lora_exp.export.verifying:_run",
    "while noting": "lora_exp.export.run:write_card",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("where", WHERE)
def test_a_signal_leaves_nothing_behind(where: str, number: int, forked: Forked, trained: Path) -> None:
    done = forked(*EXPORT, folder=trained, target=WHERE[where], do="signal", signal=int(number))
    assert done.code == 128 + number, done.err
    assert "Traceback" not in done.err
    exports = trained / "outputs/exports"
    assert not exports.exists() or list(exports.iterdir()) == []


def test_the_runtime_ends_with_the_export_that_asked_it(forked: Forked, trained: Path) -> None:
    aim = {"target": "lora_exp.export.verifying:_run", "do": "signal later", "signal": int(signal.SIGKILL)}
    temporary = trained / "temporary"
    temporary.mkdir()
    done = forked(*EXPORT, folder=trained, environment={"TMPDIR": str(temporary)}, delays=[0.5], **aim)
    assert done.code == -signal.SIGKILL, done.err
    assert [path.name for path in temporary.glob(".lora_exp_reading_*")] == []
    deadline = time.monotonic() + 20
    while readers := runtimes_of(trained):
        assert time.monotonic() < deadline, readers
        time.sleep(0.05)
    assert list((trained / TARGET).parent.glob(".*.writing/.lora_exp_reading_*/answer.safetensors")) == []
    assert forked(*EXPORT, folder=trained).code == 0
    assert [path.name for path in (trained / "outputs/exports").iterdir()] == ["day-run-merged"]
    assert [path.name for path in (trained / TARGET).glob(".*")] == []


def runtimes_of(folder: Path) -> list[int]:
    """The processes that read an export and stand in ``folder``."""
    found = (process.info for process in psutil.process_iter(["pid", "cmdline", "cwd"]))
    reading = "lora_exp.export.reading"
    return [each["pid"] for each in found if reading in (each["cmdline"] or []) and each["cwd"] == str(folder)]


def test_kills_at_random_moments(forked: Forked, trained: Path) -> None:
    begun = time.monotonic()
    whole = forked(*EXPORT, folder=trained)
    assert whole.code == 0, whole.err
    assert under_the_name(trained)
    usual_s, drawn = time.monotonic() - begun, random.Random(int(os.environ.get("SEED", "0")))
    kills = 0
    for _ in range(TRIALS):
        earlier = (trained / TARGET / "provenance.json").read_bytes()
        done = forked(*EXPORT, "export.overwrite=true", folder=trained, kill_after_s=drawn.uniform(0, usual_s))
        kills += done.code == -signal.SIGKILL
        assert under_the_name(trained), "the one that was there before is gone"
        assert done.code != 0 or (trained / TARGET / "provenance.json").read_bytes() != earlier
    assert kills or TRIALS < 20
    assert forked(*EXPORT, "export.overwrite=true", folder=trained).code == 0
    assert [path.name for path in (trained / "outputs/exports").iterdir()] == ["day-run-merged"]


def test_kills_where_nothing_was_before(forked: Forked, trained: Path) -> None:
    begun = time.monotonic()
    assert forked(*EXPORT, "export.path=outputs/first", folder=trained).code == 0
    usual_s, drawn = time.monotonic() - begun, random.Random(1)
    for _ in range(TRIALS):
        done = forked(*EXPORT, folder=trained, kill_after_s=drawn.uniform(0.2 * usual_s, 1.1 * usual_s))
        if under_the_name(trained):
            assert done.code in (0, -signal.SIGKILL)
            shutil.rmtree(trained / TARGET)
        else:
            assert done.code == -signal.SIGKILL
    assert forked(*EXPORT, folder=trained).code == 0
    assert under_the_name(trained)
    assert [path.name for path in (trained / "outputs/exports").iterdir()] == ["day-run-merged"]
