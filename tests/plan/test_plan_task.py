"""``task=plan`` from the command line, and the look before training."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp.config import Config, ModelConfig
from lora_exp.machine.place import Place
from lora_exp.plan import precheck

CPU = Place(torch.device("cpu"), torch.float32)
SMALL = ["task=plan", "model=gpt2", "tracking=none", "train.micro_batch_size=1", "data.block_size=16"]


def test_a_plan_prints_writes_and_tracks(cli: Any, workplace: Path) -> None:
    arguments = [value for value in SMALL if value != "tracking=none"]
    done = cli(*arguments, "plan.gpu_gib=24")
    assert done.code == 0, done.err
    for shown in ("transformer.h.*.attn.c_attn", "125,619,456", "base weights, bfloat16", "Fits into 24 GiB"):
        assert shown in done.out
    (folder,) = [file.parent for file in (workplace / "outputs" / "runs").rglob("plan.json")]
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["trainable"], len(plan["modules"]), plan["fit"]["fits"]) == (1_179_648, 48, True)
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{workplace / 'outputs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("lora_exp")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics["params/trainable"] == 1_179_648
    assert run.data.metrics["plan/total_gib"] == pytest.approx(plan["total_bytes"] / 2**30)
    assert (run.info.status, run.data.params["task"]) == ("FINISHED", "plan")
    assert (run.info.run_name, run.data.tags["lora_exp.kind"]) == ("plan gpt2 lora r8", "plan")


def test_a_sweep_of_plans_is_one_table_smallest_first(cli: Any, workplace: Path, tiny_llama: Path) -> None:
    tiny = ["model=hf", f"model.path={tiny_llama}", "model.label=tiny"]
    done = cli("-m", *SMALL, *tiny, "rank=2,4", "quantization=none,nf4", "plan.gpu_gib=24")
    assert done.code == 0, done.err
    (file,) = workplace.rglob("comparison.csv")
    header, *rows = [line.split(",") for line in file.read_text().splitlines()]
    assert header == ["job", "rank", "quantization", "trainable", "total GiB", "base", "trained", "activations",
                      "logits", "fits", "max batch", "max rank", "status"]  # fmt: skip
    totals = [float(row[4]) for row in rows]
    assert totals == sorted(totals)
    assert {(row[9], row[-1]) for row in rows} == {("yes", "FINISHED")}


def test_a_local_config_json_is_enough(cli: Any, tiny_llama: Path) -> None:
    for path in (tiny_llama, tiny_llama / "config.json"):
        done = cli(*SMALL, "model=hf", f"model.path={path}", "model.label=tiny")
        assert done.code == 0, done.err
        assert "model.layers.*.mlp.down_proj" in done.out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model=hf", "model.path=nowhere"], "has no config.json"),
        (["model=hf", "model.name=nobody/nothing"], "model.path=FILE_OR_FOLDER"),
        (["model.architecture.model_type=alien"], "transformers cannot read this architecture"),
        (["plan.gpu_gib=0.5"], "must be above plan.reserve_gib"),
        (["quantization=nf4", "quantization.block_size=63"], "quantization.block_size=63"),
        (["quantization=nf4", "adapter=full"], "freezes what adapter=full would train"),
    ],
)
def test_what_cannot_be_planned_says_why(cli: Any, overrides: list[str], said: str) -> None:
    done = cli(*SMALL, *overrides)
    assert done.code != 0
    assert said in done.out + done.err


def test_training_is_refused_or_warned_about_when_it_will_not_fit(cli: Any, tiny_overrides: list[str]) -> None:
    tight = [*tiny_overrides, "tracking=none", "plan.gpu_gib=0.0001", "plan.reserve_gib=0"]
    refused = cli(*tight, "plan.strict=true")
    assert refused.code != 0
    assert "This needs about" in refused.out + refused.err
    assert "train.gradient_checkpointing=true" in refused.out + refused.err
    warned = cli(*tight, "train.gradient_checkpointing=true")
    assert warned.code == 0, warned.err
    assert "This needs about" in warned.out


def test_the_look_is_silent_when_it_fits_or_cannot_tell(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    unknown = Config(model=ModelConfig(label="odd", architecture={"model_type": "alien"}))
    unknown.quantization.name = "none"
    precheck.check_fits(unknown, CPU)
    assert not caplog.records
    unknown.plan.strict = True
    with pytest.raises(ValueError, match="odd cannot be planned"):
        precheck.check_fits(unknown, CPU)


def test_memory_is_the_gpu_s_or_what_the_process_may_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr(precheck, "_CGROUP", limit)
    whole = precheck.memory_gib(torch.device("cpu"))
    limit.write_text(f"{2**29}\n")
    assert precheck.memory_gib(torch.device("cpu")) == 0.5
    limit.write_text("max\n")
    assert precheck.memory_gib(torch.device("cpu")) == whole
    gpu = SimpleNamespace(total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert precheck.memory_gib(torch.device("cuda")) == 24
