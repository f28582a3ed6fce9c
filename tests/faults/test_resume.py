"""A run that was interrupted and gone on with ends in the same bits as one that was not."""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_exp.job import read_outcome

Forked = Callable[..., Any]
STEP = "lora_exp.training.loop:_accumulate"
JOB = "hydra.run.dir=outputs/job"
LENGTH = ["train.steps=9", "train.save_every=3"]
# With each of them something else is to be kept: generators, masks, the optimizer's state in 8 bits, what is frozen.
KINDS = {
    "accumulation, dropout and checkpointing": [
        "train.grad_accum_steps=2", "dropout=0.3", "train.gradient_checkpointing=true", "data.block_size=100",
    ],
    "8 bit": ["adapter=full", "optimizer=adamw_8bit"],  # of 4096 values on, as the embedding has
}  # fmt: skip
SLOW = {
    "plain": [],
    "dora": ["adapter=dora", "dropout=0.1"],
    "modules to save": ["model.modules_to_save=[lm_head]"],
    "nf4": ["quantization=nf4", "quantization.block_size=32", "quantization.skip_modules=[down_proj]"],
    "peft": ["backend=peft", "dropout=0.3"],
    "LoRA-FA": ["adapter=lora_fa", "start=orthogonal"],
    "pissa": ["start=pissa"],
    "vera": ["adapter=vera"],
    "LoRA+": ["optimizer.lora_plus_ratio=4"],
    "early stopping, best": [
        "train.early_stopping=2", "train.min_delta=0.5", "train.eval_every=1", "train.save_every=1",
    ],
}  # fmt: skip


@pytest.mark.parametrize("kind", [*KINDS, *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)])
def test_it_ends_in_the_same_bits(kind: str, forked: Forked, tiny_overrides: list[str]) -> None:
    """Killed in the middle of a step. Blocks of 100 tokens make an epoch of fewer batches."""
    overrides = [*tiny_overrides, JOB, *LENGTH, *{**KINDS, **SLOW}[kind]]
    whole = forked(*overrides)
    assert whole.code == 0, whole.err
    half = forked(*overrides, target=STEP, at=3 if "stopping" in kind else 8, do="kill")
    assert half.code == -signal.SIGKILL
    done = forked(*overrides, "resume=auto", folder=half.folder)
    assert done.code == 0, done.err
    assert "from optimizer step" in done.out
    assert done.earned() == whole.earned()
    assert done.points() == whole.points()
    assert done.statuses() == ["FINISHED"]
    outcomes = [read_outcome(each.folder / "outputs/job") for each in (whole, done)]
    assert len({(each.result.eval_loss, each.result.best_step) for each in outcomes}) == 1  # type: ignore[union-attr]


def test_it_multiplies_as_it_did_before(forked: Forked, tiny_overrides: list[str]) -> None:
    """A machine that would answer otherwise by now, or another one, must not change the bits."""
    overrides = [*tiny_overrides, JOB, *LENGTH, "model.dtype=auto"]  # by the answer, float32 or bfloat16
    forced = {"LORA_EXP_BF16": "float32", "LORA_EXP_FLOAT32": "blas"}
    whole = forked(*overrides, environment=forced)
    half = forked(*overrides, environment=forced, target=STEP, at=8, do="kill")
    done = forked(
        *overrides,
        "resume=auto",
        folder=half.folder,
        environment={"LORA_EXP_BF16": "native", "LORA_EXP_FLOAT32": "blas"},
    )
    assert done.code == 0, done.err
    assert done.earned() == whole.earned()


@pytest.mark.slow
def test_convolutions_end_in_the_same_bits(forked: Forked, tmp_path: Path) -> None:
    """A frozen EfficientNet with a head that is trained in full beside LoRA on its convolutions."""
    pytest.importorskip("efficientnet_lite_pytorch")
    from lora_exp.models import efficientnet_lite as lite

    torch.manual_seed(0)
    torch.save(lite.network(16).state_dict(), tmp_path / "weights.pth")
    lite.convert(tmp_path / "weights.pth", tmp_path)
    drawn = random.Random(0)
    lines = [[drawn.randrange(128) + 127 * label for _ in range(64)] + [label] for label in [0, 1] * 20]
    (tmp_path / "images.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    overrides = [
        "+experiment=vision_conv2d", "tracking.experiment=lora_exp", f"model.path={tmp_path}", "dropout=0.1",
        f"data.path={tmp_path / 'images.csv'}", "data.image_size=16", "data.train_images=20", "device=cpu", *LENGTH,
        "train.warmup_steps=1", "train.eval_every=3", "train.eval_blocks=8", "train.micro_batch_size=4", JOB,
    ]  # fmt: skip
    whole = forked(*overrides)
    assert whole.code == 0, whole.err
    half = forked(*overrides, target=STEP, at=8, do="kill")
    done = forked(*overrides, "resume=auto", folder=half.folder)
    assert done.code == 0, done.err
    assert done.earned() == whole.earned()
    assert done.points() == whole.points()


@pytest.fixture
def killed(forked: Forked, tiny_overrides: list[str]) -> Any:
    """A run with checkpoints of steps 3 and 6."""
    ended = forked(*tiny_overrides, JOB, *LENGTH, target=STEP, at=8, do="kill")
    assert ended.code == -signal.SIGKILL
    return ended


def job(ended: Any) -> Path:
    return Path(ended.folder) / "outputs/job"


def test_what_cannot_be_gone_on_with_is_refused_and_stays(
    killed: Any, forked: Forked, tiny_overrides: list[str], text_file: Path, tmp_path: Path
) -> None:
    """Each by its reason and the next move; then it is gone on with as if nothing had been asked."""
    before = {path.name: path.read_bytes() for path in job(killed).rglob("*") if path.is_file()}
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text().replace("king", "queen"))
    asked = {
        "holds a run that stopped after optimizer step 6: go on with it by resume=auto": [],
        "  - rank: 8 → 4\n  - train.steps: 9 → 10\n": ["resume=auto", "rank=4", "train.steps=10"],
        "resume=nowhere is neither a run's folder nor the id": ["resume=nowhere"],
        "has no run ": [f"resume={'0' * 32}"],
        "holds no checkpoint": [f"resume={tmp_path}", "hydra.run.dir=outputs/new"],
        f"data.path: {text_file} → {other}": ["resume=auto", f"data.path={other}"],
    }
    for message, overrides in asked.items():
        done = forked(*tiny_overrides, JOB, *LENGTH, *overrides, folder=killed.folder)
        assert done.code == 1
        assert message in done.err
        assert "Traceback" not in done.err
    after = {path.name: path.read_bytes() for path in job(killed).rglob("*") if path.is_file()}
    assert {name for name in before if before[name] != after.get(name)} <= {
        "config.yaml", "overrides.yaml", "hydra.yaml", "lora_exp.log", ".in_use.json", "begun.json"
    }  # fmt: skip
    done = forked(*tiny_overrides, JOB, *LENGTH, "resume=auto", "train.save_every=2", "train.keep_checkpoints=1",
                  folder=killed.folder)  # fmt: skip
    assert done.code == 0, done.err
    assert [path.name for path in (job(done) / "checkpoints").iterdir()] == ["step_00000009"]


def test_another_base_under_the_same_name_is_refused(
    forked: Forked, tiny_overrides: list[str], tiny_llama: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    overrides = [*tiny_overrides, f"model.path={base}", JOB, *LENGTH]
    killed = forked(*overrides, target=STEP, at=8, do="kill")
    weights = load_file(base / "model.safetensors")
    save_file(
        {**weights, "lm_head.weight": weights["lm_head.weight"] + 1}, base / "model.safetensors", {"format": "pt"}
    )
    done = forked(*overrides, "resume=auto", folder=killed.folder)
    assert done.code == 1
    assert "base_files_sha256 is not what the run began with" in done.err
    assert done.statuses() == ["FAILED"]


def test_a_damaged_newest_is_passed_over_and_an_mlflow_run_found_by_its_id(
    killed: Any, forked: Forked, tiny_overrides: list[str]
) -> None:
    """From a new folder; the old one stays as it was."""
    whole = forked(*tiny_overrides, JOB, *LENGTH)
    damaged = job(killed) / "checkpoints/step_00000006/tensors.safetensors"
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(bytes(raw))
    (run,) = killed.runs()
    done = forked(*tiny_overrides, *LENGTH, "hydra.run.dir=outputs/new", f"resume={run.info.run_id}",
                  folder=killed.folder)  # fmt: skip
    assert done.code == 0, done.err
    assert "The checkpoint of step 6 is passed over (tensors.safetensors is not what was written)" in done.out
    assert "from optimizer step 3" in done.out
    assert done.earned("outputs/new") == whole.earned()
    assert done.points() == whole.points()
    (again,) = done.runs()
    assert again.info.run_id == run.info.run_id
    assert again.data.tags["folder"] == str(done.folder / "outputs/new")
    assert bytes(raw) == damaged.read_bytes()


SIGNALS = {
    "step": (signal.SIGTERM, {"target": STEP, "at": 5}, 5),
    "evaluation": (signal.SIGINT, {"target": "lora_exp.training.loop:evaluate", "at": 4}, 6),
}


@pytest.mark.parametrize("where", SIGNALS)
def test_a_signal_keeps_what_was_learnt_up_to_it(where: str, forked: Forked, tiny_overrides: list[str]) -> None:
    """A step is finished, an evaluation is not, but made up for."""
    number, aim, step = SIGNALS[where]
    overrides = [*tiny_overrides, JOB, "train.steps=7", "train.save_every=0", "dropout=0.2"]
    whole = forked(*overrides)
    ended = forked(*overrides, **aim, do="signal", signal=int(number))
    assert ended.code == 128 + number, ended.err
    assert ended.statuses() == ["KILLED"]
    assert [path.name for path in (job(ended) / "checkpoints").iterdir()] == [f"step_{step:08d}"]
    done = forked(*overrides, "resume=auto", folder=ended.folder)
    assert done.code == 0, done.err
    assert done.earned() == whole.earned()
    assert done.points() == whole.points()
    assert "error" not in done.runs()[0].data.tags


def test_a_full_disk_costs_the_checkpoint_that_did_not_fit(forked: Forked, tiny_overrides: list[str]) -> None:
    overrides = [*tiny_overrides, JOB, *LENGTH]
    whole = forked(*overrides)
    full = forked(*overrides, target="lora_exp.training.checkpoints:save_file", at=2, do="full disk")
    assert full.code == 1
    assert "The disk is full" in full.err
    assert full.statuses() == ["FAILED"]
    assert [path.name for path in (job(full) / "checkpoints").iterdir()] == ["step_00000003"]
    done = forked(*overrides, "resume=auto", folder=full.folder)
    assert done.code == 0, done.err
    assert done.earned() == whole.earned()
    assert done.points() == whole.points()


def test_a_finished_run_is_found_finished(
    forked: Forked, tiny_overrides: list[str], text_file: Path, tmp_path: Path
) -> None:
    """Nothing is trained again, nothing is in MLflow twice; and where nothing was, a run begins."""
    test = tmp_path / "test.txt"
    test.write_text(text_file.read_text().replace("king", "queen"))
    overrides = [*tiny_overrides, JOB, "train.keep=best", "resume=auto", f"data.test_path={test}"]
    first = forked(*overrides)
    assert first.code == 0, first.err
    again = forked(*overrides, folder=first.folder, target=STEP, do="kill")
    assert again.code == 0, again.err
    assert again.statuses() == ["FINISHED"]
    assert again.points() == first.points()
    outcomes = [read_outcome(job(each)) for each in (first, again)]
    assert len({str(each.result.test) for each in outcomes}) == 1  # type: ignore[union-attr]


def test_a_sweep_goes_on_where_it_was(forked: Forked, tiny_overrides: list[str]) -> None:
    """Its first job was finished, its second was not; none of the first's steps is done again."""
    overrides = [*tiny_overrides, *LENGTH, "rank=2,4", "-m", "hydra.sweep.dir=outputs/sweep"]
    killed = forked(*overrides, target=STEP, at=9 + 8, do="kill")
    assert killed.code == -signal.SIGKILL
    done = forked(*overrides, "resume=auto", folder=killed.folder, target=STEP, at=4, do="kill")
    assert done.code == 0, done.err  # three steps were left
    assert done.statuses() == ["FINISHED", "FINISHED", "FINISHED"]
