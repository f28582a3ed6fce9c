"""What was earned stays when the server goes or the disk is full, and what is said of it is true."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_exp.job import read_outcome

Forked = Callable[..., Any]
IN_JOB = "hydra.run.dir=outputs/job"


@pytest.mark.parametrize(
    ("call", "spared"),
    [
        ("runs/log-batch", 0),
        pytest.param("runs/log-batch", 3, marks=pytest.mark.slow),
        pytest.param("runs/update", 0, marks=pytest.mark.slow),
    ],
)
def test_a_server_that_goes_away_takes_no_result_with_it(
    call: str, spared: int, forked: Forked, fake_server: Callable[..., Any], tiny_overrides: list[str],
) -> None:  # fmt: skip
    """Before training, in the middle of it, or at the last call."""
    server = fake_server(fails_at=call, spared=spared)
    address = f"http://127.0.0.1:{server.port}"
    began = time.monotonic()
    done = forked(*tiny_overrides, IN_JOB, environment={"MLFLOW_TRACKING_URI": address})
    assert time.monotonic() - began < 90
    assert done.code == 0, done.err
    assert "Traceback" not in done.err
    shown = done.out + done.err
    assert f"MLflow at {address} lacks" in shown
    assert f"task=sync run={done.folder}/outputs/job" in shown
    outcome = read_outcome(done.folder / "outputs/job")
    assert outcome is not None
    assert outcome.status == "FINISHED"
    assert outcome.result is not None
    assert outcome.result.eval_loss < outcome.result.eval_loss_before
    assert (done.folder / "outputs/job/adapter/adapter_model.safetensors").is_file()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB, where this may be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or os.geteuid() or mount is None:
        pytest.skip("needs to mount a file system")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("left_kib", [pytest.param(0, marks=pytest.mark.slow), 200])
def test_a_full_disk_keeps_the_earlier_adapter_and_says_so(
    left_kib: int, small_disk: Path, forked: Forked, tiny_overrides: list[str], workplace: Path
) -> None:
    first = forked(*tiny_overrides, IN_JOB, "rank=2", folder=small_disk, terminal=workplace)
    assert first.code == 0, first.err
    job = small_disk / "outputs/job"
    before = {path.name: path.read_bytes() for path in (job / "adapter").iterdir()}
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    (small_disk / "filling").write_bytes(b"x" * (free - left_kib * 1024))
    done = forked(*tiny_overrides, IN_JOB, "rank=16", folder=small_disk, terminal=workplace)
    assert done.code == 1
    assert "The disk is full (" in done.err
    assert "Traceback" not in done.err
    assert len(done.err.splitlines()) <= 4, done.err
    weights = load_file(job / "adapter/adapter_model.safetensors")  # whole, and of one save
    after = {path.name: path.read_bytes() for path in (job / "adapter").iterdir()}
    assert after == before or {min(tensor.shape) for tensor in weights.values()} == {16}
    assert not [path for path in job.iterdir() if path.name.startswith(".adapter")]
    (small_disk / "filling").unlink()
    assert done.statuses() in (["FAILED", "FINISHED"], ["FINISHED"])  # or there was no room to begin
    again = forked(*tiny_overrides, IN_JOB, "rank=16", folder=small_disk, terminal=workplace)
    assert again.code == 0, again.err


def test_metrics_that_cannot_be_written_end_in_one_clear_error(
    forked: Forked, tiny_overrides: list[str], workplace: Path
) -> None:
    job = workplace / "call/outputs/job"
    job.mkdir(parents=True)
    (job / "metrics.jsonl").symlink_to("/dev/full")
    done = forked(*tiny_overrides, IN_JOB, folder=workplace / "call")
    assert done.code == 1
    assert "No space left on device" in done.err
    assert "Traceback" not in done.err
    assert done.statuses() == ["FAILED"]
    outcome = read_outcome(job)
    assert outcome is not None
    assert outcome.status == "FAILED"
