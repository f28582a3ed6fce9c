"""How far a sweep is, as its folder tells."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from lora_exp.job import METRICS_FILE, Job, Outcome, Result, read_outcome, write_begun, write_outcome
from lora_exp.machine.process import Process
from lora_exp.sweep import live
from lora_exp.sweep.state import Looking, note_launched

OVERRIDES = [["model=m", f"rank={rank}"] for rank in (2, 4, 8, 16, 32, 64)]


@pytest.fixture
def half_way(tmp_path: Path, made_up: SimpleNamespace) -> Path:
    """Of ten trials six were launched: two are done, one of them cut, one failed, one runs, one is lost, one waits."""
    tmp_path = tmp_path / "sweep"
    made_up.sweep(tmp_path, swept={"rank": [2, 4, 8]}, failing=(1,))
    note_launched(tmp_path, OVERRIDES, 0, total=10)
    (tmp_path / ".in_use.json").write_text(str(Process.mine()))
    for number, overrides in enumerate(OVERRIDES[:3]):
        outcome = read_outcome(tmp_path / str(number))
        assert outcome is not None
        result = outcome.result
        if isinstance(result, Result) and number == 2:
            result = replace(result, pruned_at=12)
        write_outcome(tmp_path / str(number), replace(outcome, overrides=overrides, result=result))
    begin(tmp_path / "3", 3, Process.mine(), [{"step": 0, "eval/loss": 4.0}, {"step": 9, "train/loss": 3.0}])
    begin(tmp_path / "4", 4, replace(Process.mine(), pid=2**22 + 1), [])
    return tmp_path


def begin(folder: Path, number: int, process: Process, records: list[dict[str, Any]]) -> None:
    folder.mkdir()
    write_begun(Job(folder, number, OVERRIDES[number]), steps=36)
    (folder / ".in_use.json").write_text(str(process))
    (folder / METRICS_FILE).write_text("".join(json.dumps(record) + "\n" for record in records) + '{"st')


def test_each_job_is_what_its_folder_says(half_way: Path, made_up: SimpleNamespace) -> None:
    state = Looking(half_way).state()
    assert [job.kind for job in state.jobs] == ["done", "failed", "pruned", "running", "lost", "waiting"]
    assert state.counts == {"done": 1, "pruned": 1, "running": 1, "waiting": 5, "failed": 1, "lost": 1}
    assert (state.total, len(state.ended), state.is_live) == (10, 3, True)
    (running,) = state.running
    assert (running.step, running.steps, running.loss, running.evaluated) == (9, 36, 4.0, 0)
    assert state.title(running) == "job 3 rank=16"
    assert state.best is not None
    assert state.best.number == 2
    assert state.best.outcome is not None
    assert state.best.outcome.result.objective == pytest.approx(made_up.loss_of({"rank": 8}))  # type: ignore[union-attr]


def test_what_is_left_goes_by_the_pace_so_far(half_way: Path) -> None:
    """Two jobs and a quarter were trained; six and three quarters are still to be."""
    launched = json.loads((half_way / "launched.json").read_text())
    (half_way / "launched.json").write_text(json.dumps(launched | {"at": time.time() - 130}))
    state = Looking(half_way).state()
    assert state.elapsed_s == pytest.approx(130, abs=2)
    assert state.left_s == pytest.approx(130 / 2.25 * 6.75, rel=0.02)


def test_what_ended_is_read_again_only_where_it_changed(half_way: Path) -> None:
    looking = Looking(half_way)
    first = looking.state().jobs[0]
    assert looking.state().jobs[0] is first
    write_outcome(half_way / "0", Outcome(0, "KILLED", OVERRIDES[0], {}, error="SIGTERM"))
    assert looking.state().jobs[0].kind in ("killed", "done")  # a file system may keep whole seconds
    write_outcome(half_way / "3", Outcome(3, "KILLED", OVERRIDES[3], {}, error="SIGTERM"))
    assert looking.state().jobs[3].kind == "killed"


def test_batches_of_a_sweeper_add_up_and_a_new_sweep_in_the_folder_begins_anew(tmp_path: Path) -> None:
    note_launched(tmp_path, OVERRIDES[:2], 0, total=6)
    note_launched(tmp_path, OVERRIDES[2:4], 2, total=6)
    state = Looking(tmp_path).state()
    assert ([job.number for job in state.jobs], state.total) == ([0, 1, 2, 3], 6)
    note_launched(tmp_path, OVERRIDES[:1], 0, total=None)
    assert Looking(tmp_path).state().total == 1


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_display_fits_a_terminal_and_says_it_all(half_way: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width)
    console.print(live.display(Looking(half_way).state()))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert all(len(line) <= width for line in said.splitlines())
    assert "3/10 jobs  1 done, 1 pruned" in said
    assert "step    9/36  validation loss 4.0000 job 3 rank=" in said
    if width == 120:
        assert "1 running, 5 waiting, 1 failed, 1 lost" in said
        assert "ETA" in said
        assert "best so far  2." in said


def test_each_thing_is_told_once(half_way: Path) -> None:
    said: list[str] = []
    telling, looking = live._Telling(said.append), Looking(half_way)
    for _ in range(3):
        telling.tell(looking.state())
    assert len(said) == 5
    assert said[0].startswith("job 0 rank=2  done  validation loss 2.")
    assert said[1].startswith("job 1 rank=4  FAILED: eval/loss became nan")
    assert said[2].startswith("job 2 rank=8  pruned")
    assert said[3] == "job 3 rank=16  has begun"
    assert said[4] == "job 3  step    0/36  validation loss 4.0000"
    with (half_way / "3" / METRICS_FILE).open("w") as stream:
        stream.write(json.dumps({"step": 12, "eval/loss": 3.5}) + "\n" + json.dumps({"step": 13}) + "\n")
    for _ in range(2):
        telling.tell(looking.state())
    assert said[5:] == ["job 3  step   12/36  validation loss 3.5000"]
    (half_way / ".stop.json").write_text('{"signal": 2, "requests": 1}')
    telling.tell(looking.state())
    assert said[6:] == [f"The sweep {live.STOPPING}"]


def test_status_tells_it_from_anywhere(half_way: Path, cli: Callable[..., Any], workplace: Path) -> None:
    """The folder is the workplace here; no MLflow is asked."""
    found = cli("task=status", f"run={half_way}", "tracking.uri=http://127.0.0.1:1")
    assert found.code == 0, found.err
    assert "3/10 jobs  1 done, 1 pruned, 1 running, 5 waiting, 1 failed, 1 lost  ETA" in found.out
    assert "job 1 rank=4  FAILED: eval/loss became nan" in found.out
    assert "job 4 rank=32  lost: its process is gone" in found.out


def test_status_takes_the_sweep_begun_last_and_refuses_what_is_none(cli: Callable[..., Any], workplace: Path) -> None:
    none = cli("task=status")
    assert none.code == 1
    assert "There is no sweep in" in none.err
    for name in ("a", "b"):
        note_launched(workplace / "outputs/sweeps/today" / name, OVERRIDES[: 1 + (name == "b")], 0, None)
        time.sleep(0.02)
    assert "0/2 jobs  2 waiting" in cli("task=status").out
    (workplace / "empty").mkdir()
    wrong = cli("task=status", "run=empty")
    assert wrong.code == 1
    assert "run=empty is not the folder of a sweep" in wrong.err
