"""Whole runs by others' trainers: the same files, one MLflow run, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient

from lora_exp.checks import check
from lora_exp.config import Config, ConfigError, conf_folder
from lora_exp.schema import register, to_config
from lora_exp.training.reports import Reports

Cli = Callable[..., Any]


def settings(*overrides: str) -> Config:
    from hydra import compose, initialize_config_dir

    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def layout(folder: Path) -> dict[str, object]:
    """Its files but checkpoints, and what stands in those that tell of the training."""
    names = (str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    files = sorted(name for name in names if not name.startswith("checkpoints/"))
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    keys = [sorted(key for key in record if key not in ("train/entropy", "train/mean_token_accuracy"))
            for record in records]  # fmt: skip
    result = json.loads((folder / "result.json").read_text())
    return {"files": files, "records": keys, "result": sorted(result["result"]), "status": result["status"]}


@pytest.mark.parametrize("name", ["hf", "trl_sft"])
def test_a_run_leaves_what_a_native_one_leaves(
    name: str, cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "trl_sft":
        pytest.importorskip("trl")
    monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", "1")  # what wakes transformers' own callback
    folders = {}
    for trainer in ("native", name):
        folders[trainer] = workplace / f"outputs/{trainer}"
        done = cli(*tiny_overrides, f"trainer={trainer}", f"hydra.run.dir={folders[trainer]}")
        assert done.code == 0, done.err
        assert "{'" not in done.out, "a Trainer prints its own records"
    assert layout(folders[name]) == layout(folders["native"])
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    runs = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
    theirs, native = runs
    assert theirs.data.params == {**native.data.params, "trainer": name}
    assert theirs.data.metrics["train/loss"] == pytest.approx(native.data.metrics["train/loss"], abs=1e-4)
    assert sorted(path.name for path in workplace.iterdir()) == ["cache", "outputs"]


def test_a_signal_ends_the_run_before_the_next_micro_batch(
    cli: Cli, tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add, losses = Reports.add, []

    def add_and_signal(self: Reports, loss: torch.Tensor) -> None:
        add(self, loss)
        losses.append(loss)
        if len(losses) == 7:  # the first micro batch of the third step
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Reports, "add", add_and_signal)
    done = cli(*tiny_overrides, "trainer=hf", "train.grad_accum_steps=3")
    assert done.code == 143, done.err
    assert len(losses) == 7
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    (run,) = client.search_runs([each.experiment_id for each in client.search_experiments()])
    assert run.info.status == "KILLED"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")] == [1, 2]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer=hf", "model.dtype=float16"], "does not scale losses.*use bfloat16 or trainer=native"),
        (["trainer=hf", "device=cuda:1"], "not on device=cuda:1: set CUDA_VISIBLE_DEVICES=1 and device=cuda"),
        (["trainer=trl_sft", "data=mnist5k"], r"learns to predict tokens, which data=mnist5k \(images\) does not"),
        (["trainer=nobodys"], "trainer=nobodys is not known: choose one of hf, native, trl_sft"),
    ],
)
def test_what_they_do_not_do_is_refused_before_anything_is_loaded(overrides: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(settings(*overrides))


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="trainer=hf trains in one process here: use trainer=native"):
        check(settings("trainer=hf"))


@pytest.mark.parametrize(("name", "library", "extra"), [("hf", "accelerate", "hf"), ("trl_sft", "trl", "trl")])
def test_a_library_that_is_missing_is_named_with_its_extra(
    name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda wanted: None if wanted == library else object())
    with pytest.raises(
        ConfigError, match=rf"trainer={name}: {library} not installed: pip install 'lora_exp\[{extra}\]"
    ):
        check(settings(f"trainer={name}"))
    check(settings(f"trainer={name}", "task=plan"))
