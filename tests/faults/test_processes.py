"""Several processes: one process's figures, one writer, and one end wherever it began."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lora_exp.job import read_metrics, read_outcome

Forked = Callable[..., Any]
STEP = "lora_exp.training.loop:_accumulate"
JOB = "outputs/job"
SMALL = ["hydra.run.dir=outputs/job", "train.steps=3", "train.eval_every=2", "train.eval_blocks=5"]
EPOCH = ["data.block_size=64", "train.micro_batch_size=8", "train.steps=null", "train.epochs=1"]  # 11 micro batches
CASES = {
    "ddp": [],
    "ddp, an epoch": EPOCH,
    "fsdp, an epoch": ["parallel=fsdp", *EPOCH],
    "ddp, accumulating": ["train.grad_accum_steps=2"],
    "ddp, DoRA": ["adapter=dora"],
    "ddp, biases": ["bias=all"],
    "ddp, all weights": ["adapter=full"],
    "ddp, PEFT": ["backend=peft"],
    "ddp, checkpointing": ["train.gradient_checkpointing=true"],
    "fsdp": ["parallel=fsdp"],
    "fsdp, DoRA": ["parallel=fsdp", "adapter=dora"],
    "fsdp, biases": ["parallel=fsdp", "bias=all"],
    "fsdp, VeRA": ["parallel=fsdp", "adapter=vera"],
    "fsdp, PiSSA": ["parallel=fsdp", "start=pissa"],
    "fsdp, embedding": ["parallel=fsdp", "layer=all", "targets=[embed_tokens,q_proj]"],
    "fsdp, head": ["parallel=fsdp", "model.modules_to_save=[lm_head]"],
    "fsdp, a head alone": ["parallel=fsdp", "adapter=head", "model.modules_to_save=[lm_head]"],
    "fsdp, checkpointing": ["parallel=fsdp", "train.gradient_checkpointing=true"],
    "fsdp, bfloat16": ["parallel=fsdp", "model.dtype=bfloat16"],
}
QUICK = ("ddp, accumulating", "fsdp, an epoch", "fsdp, DoRA")


def figures(folder: Path) -> list[dict[str, float]]:
    """Each record without its speed."""
    timed = ("lane", "train/tokens_per_s", "train/mfu")
    return [{key: value for key, value in record.items() if key not in timed} for record in read_metrics(folder)]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("case", [pytest.param(c, marks=() if c in QUICK else pytest.mark.slow) for c in CASES])
def test_two_processes_give_one_processs_figures_and_adapter(
    case: str, forked: Forked, tiny_overrides: list[str]
) -> None:
    overrides = [*tiny_overrides, *SMALL, "tracking=none", "model.dtype=float32", *CASES[case]]
    accumulated = 2 if "train.grad_accum_steps=2" in overrides else 1
    alone = [value for value in overrides if not value.startswith("parallel")]
    one = forked(*alone, f"train.grad_accum_steps={2 * accumulated}")
    two = forked(*overrides, processes=2)
    assert (one.code, two.code) == (0, [0, 0]), one.err + two.err
    tolerance = 1e-2 if "bfloat16" in case else 1e-5
    pairs = list(zip(figures(one.folder / JOB), figures(two.folder / JOB), strict=True))
    assert len(pairs) >= 6
    for expected, found in pairs:
        assert found == pytest.approx(expected, rel=tolerance)
    mine, theirs = (load_file(next((each.folder / JOB / "adapter").glob("*.safetensors"))) for each in (one, two))
    assert mine.keys() == theirs.keys()
    assert all((mine[name] - theirs[name]).abs().max() <= 1e-2 * tolerance + 1e-6 for name in mine)


def test_one_process_writes_and_tracks(forked: Forked, tiny_overrides: list[str]) -> None:
    alone, two = (forked(*tiny_overrides, *SMALL, **how) for how in ({}, {"processes": 2}))
    assert two.code == [0, 0], two.err
    assert two.statuses() == ["FINISHED"]
    assert names(alone.folder / JOB) == names(two.folder / JOB)
    assert (two.folder / "out.1").read_text() == (two.folder / "err.1").read_text() == ""
    (run,) = two.runs()
    assert {name: run.data.tags[name] for name in ("processes", "parallel", "rows_per_step")} == {
        "processes": "2", "parallel": "ddp", "rows_per_step": "4",
    }  # fmt: skip


def test_a_sweep_goes_on_after_a_job_that_failed_in_another_process(forked: Forked, tiny_overrides: list[str]) -> None:
    aim = {"target": STEP, "at": 2, "do": "refuse", "rank": 1}
    done = forked(*tiny_overrides, "train.steps=2", "rank=2,4", "-m", "hydra.sweep.dir=outputs/s", processes=2, **aim)
    assert done.code == [1, 1], done.err
    assert done.statuses() == ["FAILED", "FAILED", "FINISHED"]
    outcomes = [read_outcome(done.folder / "outputs/s" / str(number)) for number in range(2)]
    assert [outcome and outcome.status for outcome in outcomes] == ["FAILED", "FINISHED"]


ENDS = {
    "refusal": ("refuse", "FAILED", 1, "process 1 of 2: a value is wrong: mend it"),
    "bug": ("fail", "FAILED", 1, "process 1 of 2: RuntimeError: what nobody foresaw"),
    "kill": ("kill", "FAILED", 1, "Another of the 2 processes ended without a word"),
    "signal": ("signal", "KILLED", 143, "SIGTERM"),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("where", [STEP, pytest.param("lora_exp.models:load_base", marks=pytest.mark.slow)])
def test_what_ends_another_process_ends_all(end: str, where: str, forked: Forked, tiny_overrides: list[str]) -> None:
    do, status, code, message = ENDS[end]
    aim = {"target": where, "at": 2 if where == STEP else 1, "do": do, "rank": 1, "signal": int(signal.SIGTERM)}
    done = forked(*tiny_overrides, *SMALL, processes=2, **aim)
    assert done.code == [code, -signal.SIGKILL if end == "kill" else code], done.err
    assert done.statuses() == [status]
    outcome = read_outcome(done.folder / JOB)
    assert outcome is not None
    assert outcome.status == status
    assert (outcome.error or "").startswith(message)
    assert (done.folder / "err.1").read_text() == ""
    if end == "bug":
        assert "what nobody foresaw" in (done.folder / JOB / "traceback.txt").read_text()


@pytest.mark.parametrize("do", ["refuse", "signal", pytest.param("kill", marks=pytest.mark.slow)])
def test_what_ends_the_leader_ends_all(do: str, forked: Forked, tiny_overrides: list[str]) -> None:
    done = forked(*tiny_overrides, *SMALL, processes=2, target=STEP, at=2, do=do, signal=int(signal.SIGINT))
    assert done.code[0] == {"refuse": 1, "signal": 130, "kill": -9}[do], done.err
    assert done.code[1] == (done.code[0] if do != "kill" else 1)
    said = (done.folder / "err.1").read_text()
    assert "Traceback" not in said
    assert not said or do == "kill"  # then torch, loaded before it is told to be quiet, has words for a lost connection


@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_a_run_of_two_processes_goes_on_in_two_and_ends_in_the_same_bits(
    parallel: str, forked: Forked, tiny_overrides: list[str]
) -> None:
    """Each has generators, masks and a place in the rows of its own."""
    overrides = [*tiny_overrides, *SMALL, "train.steps=6", "dropout=0.3", f"parallel={parallel}"]
    whole = forked(*overrides, processes=2)
    aim = {"target": STEP, "at": 4, "do": "signal", "rank": 1, "signal": int(signal.SIGTERM)}
    half = forked(*overrides, processes=2, **aim)
    assert (whole.code, half.code) == ([0, 0], [143, 143]), whole.err + half.err
    rest = forked(*overrides, "resume=auto", folder=half.folder, processes=2)
    assert rest.code == [0, 0], rest.err
    assert rest.statuses() == ["FINISHED"]
    assert figures(rest.folder / JOB) == figures(whole.folder / JOB)
    mine, theirs = (load_file(each.folder / JOB / "adapter/adapter_model.safetensors") for each in (whole, rest))
    assert all(mine[name].equal(theirs[name]) for name in mine)


REFUSED = {
    "parallel=fsdp quantization=nf4": "parallel=fsdp cannot share out quantization=nf4's packed weights",
    "parallel=fsdp adapter=full": "parallel=fsdp shares out what is frozen, and adapter=full trains weights",
    "parallel=pipeline": "parallel=pipeline is not known: choose one of auto, ddp, fsdp",
    "device=cpu:0": "device=cpu:0 is for one process, and these are 2",
}


@pytest.mark.parametrize("wish", REFUSED)
def test_what_several_processes_cannot_do_is_refused_once(wish: str, forked: Forked, tiny_overrides: list[str]) -> None:
    done = forked(*tiny_overrides, *SMALL, "tracking=none", *wish.split(), processes=2)
    assert done.code == [1, 1], done.err
    assert REFUSED[wish] in done.err
    assert (done.folder / "err.1").read_text() == ""


def test_one_process_is_told_how_several_are_started(forked: Forked, tiny_overrides: list[str]) -> None:
    done = forked(*tiny_overrides, *SMALL, "parallel=ddp")
    assert done.code == 1
    assert "parallel=ddp is for several processes, and this is one: start them by torchrun" in done.err


@pytest.mark.parametrize("drops", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_masks_differ_between_processes(drops: bool, forked: Forked, tiny_overrides: list[str], tmp_path: Path) -> None:
    """All rows are alike: if the masks were, too, two processes' mean gradient would be that of one."""
    alike = tmp_path / "alike.txt"
    alike.write_text("go " * 2000)
    overrides = [*tiny_overrides, *SMALL, f"data.path={alike}", "tracking=none", f"dropout={0.5 if drops else 0}"]
    norms = []
    for how in ({}, {"processes": 2}):
        done = forked(*overrides, **how)
        norms.append([each["train/grad_norm"] for each in figures(done.folder / JOB) if "train/grad_norm" in each])
    assert len(norms[0]) == len(norms[1]) == 3
    is_same = [one == pytest.approx(two, rel=1e-4) for one, two in zip(*norms, strict=True)]
    assert not any(is_same) if drops else all(is_same)
