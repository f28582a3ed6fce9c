"""task=analyse: the curve ends at the run's own loss, the shrunk adapter has the loss that the curve says."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

Cli = Callable[..., Any]


@pytest.fixture
def train(cli: Cli, tiny_overrides: list[str], workplace: Path) -> Callable[..., Path]:
    def run(name: str, *overrides: str) -> Path:
        folder = workplace / "outputs/runs/day" / name
        done = cli(*tiny_overrides, "optimizer.lr=2e-2", f"hydra.run.dir={folder}", *overrides)
        assert done.code == 0, done.err
        return folder

    return run


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_a_run_is_taken_apart(train: Callable[..., Path], cli: Cli, workplace: Path) -> None:
    run = train("one", "rank=4")
    done = cli("task=analyse", f"run={run}", "analyse.margin=100", f"hydra.run.dir={workplace / 'used'}")
    assert done.code == 0, done.err
    found = run / "analyse"
    result = json.loads((run / "result.json").read_text())["result"]
    curve = {int(row["rank"]): row for row in rows(found / "rank_curve.csv")}
    assert list(curve) == [1, 2, 4]
    assert float(curve[4]["loss"]) == pytest.approx(result["eval_loss"], abs=1e-4)
    assert float(curve[4]["kept"]) == pytest.approx(1)
    assert len(rows(found / "layers.csv")) == 14
    used = json.loads((workplace / "used/result.json").read_text())["result"]["figures"]
    assert used["loss"] == pytest.approx(result["eval_loss"], abs=1e-5)
    assert used["base_loss"] == pytest.approx(result["eval_loss_before"], abs=1e-5)
    assert used["smallest_rank"] == 1
    again = cli("task=evaluate", f"run={found / 'shrunk'}", "tracking=none", *data_of(run),
                f"hydra.run.dir={workplace / 'again'}")  # fmt: skip
    assert again.code == 0, again.err
    lines = json.loads((workplace / "again/evaluation.json").read_text())["lines"]
    shrunk = next(line for line in lines if line["way"] == "adapted")
    assert shrunk["figures"]["loss"] == pytest.approx(float(curve[1]["loss"]), abs=1e-4)
    client = MlflowClient(f"sqlite:///{workplace / 'outputs/mlflow.db'}")
    told = client.get_run(result["run_id"])
    assert told.data.metrics["analyse/loss_rank_1"] == pytest.approx(float(curve[1]["loss"]), abs=1e-4)
    artifacts = {file.path for file in client.list_artifacts(result["run_id"], "analyse")}
    assert {"analyse/rank_curve.png", "analyse/spectra.png", "analyse/layers.csv"} <= artifacts


def data_of(run: Path) -> list[str]:
    """An adapter alone says neither its model nor its data."""
    import yaml

    saved = yaml.safe_load((run / "config.yaml").read_text())
    return ["model=hf", f"model.path={saved['model']['path']}", "data=text", f"data.path={saved['data']['path']}",
            "data.block_size=16", "train.eval_blocks=4", "train.micro_batch_size=2", "device=cpu"]  # fmt: skip


def test_two_runs_are_compared_and_dora_becomes_plain(train: Callable[..., Path], cli: Cli, workplace: Path) -> None:
    one, two = (
        train("one", "rank=2", "tracking=none"),
        train("two", "adapter=dora", "rank=2", "seed=1", "tracking=none"),
    )
    place = workplace / "used"
    done = cli("task=analyse", f"run={one}", f"run={two}", "tracking=none", "analyse.margin=100",
               "analyse.ranks=[1,16]", "analyse.intruders=false", f"hydra.run.dir={place}")  # fmt: skip
    assert done.code == 0, done.err
    assert {row["rank"] for row in rows(place / "overlap.csv")} == {"1", "2"}
    assert len(list(place.glob("overlap-*.png"))) == 1
    assert json.loads((two / "analyse/shrunk/adapter_config.json").read_text())["use_dora"] is False
    assert rows(two / "analyse/layers.csv")[0]["intruders"] == ""


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["adapter=full"], "task=analyse is about adapters"),
        (["backend=peft", "adapter=peft_method", "adapter.method=IA3"], "holds a 'IA3' adapter"),
    ],
)
def test_what_cannot_be_taken_apart_is_said(given: list[str], says: str, train: Callable[..., Path], cli: Cli) -> None:
    run = train("one", "tracking=none", *given)
    done = cli("task=analyse", f"run={run}", "tracking=none")
    assert done.code == 1
    assert says in done.err


def test_wishes_without_meaning_are_said(cli: Cli, tiny_overrides: list[str]) -> None:
    wrong = ["analyse.ranks=[0]", "analyse.margin=-1", "analyse.top=0", "analyse.similarity=2"]
    done = cli("task=analyse", *tiny_overrides, *wrong, "tracking=none")
    assert done.code == 1
    for said in ("add run=FOLDER", *wrong):
        assert said in done.err
