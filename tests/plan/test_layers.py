"""Layers alike are run a few times and counted as often as they are, and a bound spares most runs the rest."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from lora_exp.config import Config, conf_folder
from lora_exp.machine.place import Place
from lora_exp.plan import layers, precheck
from lora_exp.plan.estimate import Plan, Planner
from lora_exp.schema import register, to_config

register()
CASES = {
    "model=smollm2_135m": {"model.architecture.num_hidden_layers": 8},
    "model=gemma2_2b": {"model.architecture.num_hidden_layers": 8, "quantization": "nf4"},
    "model=gpt2": {"model.architecture.n_layer": 6, "adapter": "dora", "dropout": 0.1},
    "model=qwen25_3b": {"model.architecture.num_hidden_layers": 8, "targets": "'.*layers.[2-5].mlp.*proj'"},
    "model=llama2_7b": {"model.architecture.num_hidden_layers": 6, "adapter": "full", "layer": "linear"},
}


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", ["task=plan", *overrides]))


def case(name: str, *more: str) -> Config:
    return config(name, *(f"{key}={value}" for key, value in CASES[name].items()), *more)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
@pytest.mark.parametrize("name", CASES)
def test_layers_that_are_stood_in_for_count_as_if_they_ran(
    name: str, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner = Planner(case(name, f"train.gradient_checkpointing={checkpointing}"))
    short = planner.plan()
    monkeypatch.setattr(layers, "_signature", id)  # no two alike
    assert short == planner.plan()


def test_a_70b_model_is_planned_in_seconds() -> None:
    started = time.process_time()
    plan = Planner(config("model=llama31_70b", "quantization=nf4")).plan()
    assert time.process_time() - started < 20
    assert len(plan.modules) == 560


@pytest.mark.parametrize("step", [(1, 16), (1, 1024)])
@pytest.mark.parametrize("name", CASES)
def test_nothing_needs_more_than_its_bound(name: str, step: tuple[int, int]) -> None:
    planner = Planner(case(name, f"train.micro_batch_size={step[0]}", f"data.block_size={step[1]}"))
    assert planner.plan().total_bytes < planner.upper_bound() < math.inf


def test_a_model_of_another_form_has_no_bound() -> None:
    made = config("model=gpt2", "model.attention=eager")
    made.model.architecture = {"model_type": "mamba", "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2}
    assert Planner(made).upper_bound() == math.inf


def test_the_look_before_training_traces_a_step_only_where_it_is_close(monkeypatch: pytest.MonkeyPatch) -> None:
    traced, plan, cpu = [], Planner.plan, Place(torch.device("cpu"), torch.float32)

    def note(self: Planner, **size: Any) -> Plan:
        traced.append(size)
        return plan(self, **size)

    monkeypatch.setattr(Planner, "plan", note)
    made = config("model=gpt2", "task=train", "plan.gpu_gib=100")
    precheck.check_fits(made, cpu)
    assert not traced
    made.plan.gpu_gib = 2
    precheck.check_fits(made, cpu)
    assert traced
