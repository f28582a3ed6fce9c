"""What a run does with the machine's answers: dtype, tags, train/mfu, and the same bits again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

Cli = Callable[..., object]


def last_run(folder: Path) -> Path:
    return sorted((folder / "outputs/runs").glob("*/*"))[-1]


def losses(folder: Path) -> list[float]:
    lines = (last_run(folder) / "metrics.jsonl").read_text().splitlines()
    return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]


@pytest.mark.parametrize(("bf16", "dtype"), [("native", "torch.bfloat16"), ("float32", "torch.float32")])
def test_a_forced_answer_decides_dtype_and_is_recorded(
    cli: Cli, workplace: Path, tiny_overrides: list[str], bf16: str, dtype: str
) -> None:
    done = cli(*tiny_overrides, f"machine.bf16={bf16}", "machine.float32=blas")
    assert done.code == 0, done.err
    first = losses(workplace)
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("lora_exp").experiment_id])
    assert run.data.params["dtype"] == dtype
    assert run.data.tags["machine.bf16"] == bf16
    assert run.data.tags["machine.float32"] == "blas"
    assert 0 < run.data.metrics["train/mfu"] < 2
    assert cli(*tiny_overrides, f"machine.bf16={bf16}", "machine.float32=blas").code == 0
    assert losses(workplace) == first


def test_an_unknown_answer_is_refused(cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli(*tiny_overrides, "machine.bf16=fast")
    assert done.code == 1
    assert "machine.bf16=fast is not known: choose one of auto, native, float32" in done.err
