"""A job whose process died is in its sweep's comparison."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lora_exp import composing
from lora_exp.job import Outcome, read_outcome, write_outcome
from lora_exp.machine.process import Process
from lora_exp.sweep.lost import note_lost
from lora_exp.sweep.report import report_sweep


def begun(folder: Path, process: Process | None) -> Path:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("- rank=4\n")
    if process is not None:
        (folder / ".in_use.json").write_text(str(process))
    return folder


def test_only_a_job_without_an_end_whose_process_is_gone_is_lost(tmp_path: Path) -> None:
    gone = replace(Process.mine(), pid=2**22 + 1)
    lost, live, elsewhere, ended = (
        begun(tmp_path / name, process)
        for name, process in (("3", gone), ("4", Process.mine()), ("5", replace(gone, host="another")), ("6", gone))
    )
    write_outcome(ended, Outcome(6, "FINISHED", [], {}))
    assert note_lost(tmp_path) == 1
    outcome = read_outcome(lost)
    assert outcome is not None
    assert (outcome.number, outcome.status, outcome.overrides) == (3, "KILLED", ["rank=4"])
    assert read_outcome(live) is read_outcome(elsewhere) is None
    assert note_lost(tmp_path) == 0


def test_the_table_has_it_and_differs_in_nothing_for_it(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    begun(tmp_path / "0", replace(Process.mine(), pid=2**22 + 1))
    for number, rank in ((1, 2), (2, 4)):
        write_outcome(tmp_path / str(number), Outcome(number, "FAILED", [], {"rank": rank, "model": "m"}, error="x"))
    assert not report_sweep(tmp_path, interrupted=False)
    rows = (tmp_path / "comparison.csv").read_text().splitlines()
    assert rows[0].startswith("job,rank,eval/loss")
    assert "KILLED: its process ended without a word" in rows[1]


def test_a_launchers_dead_worker_is_said_without_a_traceback() -> None:
    died = type("TerminatedWorkerError", (RuntimeError,), {})("A worker was unexpectedly terminated.\n\nmore")
    said = composing.explain(died)
    assert said is not None
    assert said.startswith("A worker process of the launcher died (A worker was unexpectedly terminated.)")
