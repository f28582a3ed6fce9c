"""The one benchmark that is no matter of time: what is retained for backward, ours and PEFT's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    out = tmp_path_factory.mktemp("benchmarks")
    command = [sys.executable, "-m", "benchmarks", "--quick", "--threads", "1", "--out", str(out), "memory"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "not measured" in (out / "RESULTS.md").read_text()
    found = json.loads((out / "results.json").read_text())["memory"]
    return {row["case"]: row for row in found["rows"] + found["by_model"]}


@pytest.mark.parametrize(
    ("case", "limit"),
    [
        ("LoRA bf16 dropout 0 r=8", 0.5),
        ("LoRA bf16 dropout 0.05 r=8", 0.4),
        ("LoRA fp32 dropout 0.05 r=8", 0.6),
        ("DoRA bf16 dropout 0 r=8", 0.3),
        ("DoRA bf16 dropout 0.05 r=8", 0.3),
        ("DoRA fp32 dropout 0 r=8", 0.4),
        ("DoRA fp32 dropout 0.05 r=8", 0.34),
        ("LoRA nf4 bf16 dropout 0 r=8", 0.5),
        ("DoRA nf4 bf16 dropout 0 r=8", 0.3),
        ("small Llama, LoRA bf16 dropout 0 r=8, 1×512 tokens", 0.65),
        ("small Llama, DoRA bf16 dropout 0 r=8, 1×512 tokens", 0.4),
    ],
)
def test_retained_share_of_pefts(memory, case, limit):
    if " nf4 " in case:
        pytest.importorskip("bitsandbytes")
    assert memory[case]["share"] <= limit


def test_an_input_is_retained_once(memory):
    assert all(
        row["ours_of_x"] < (2.02 if "DoRA" in case else 1.02) for case, row in memory.items() if "ours_of_x" in row
    )


def test_the_native_path_does_not_import_peft():
    code = "import sys, lora_exp.run; print([m for m in ('peft', 'bitsandbytes') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_norms_of_gradients_are_told_by_arm(cli, tiny_overrides, workplace):
    from benchmarks.gradient_norms import KEY, told

    done = cli(*tiny_overrides, "-m", "rank=2,4", "seed=0,1", "tracking=none", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.err
    rows = told(workplace / "sweep").splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == ["| rank=2", "| rank=4"]
    firsts = []
    for job in (0, 1):
        lines = (workplace / f"sweep/{job}/metrics.jsonl").read_text().splitlines()
        firsts.append(next(record[KEY] for record in map(json.loads, lines) if KEY in record))
    assert rows[0].split(" | ")[1:3] == ["2", f"{sum(firsts) / 2:.3g}"]
