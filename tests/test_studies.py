"""The packaged studies: each can be run as it stands and on a GPU, and arms that are to be equal are."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from lora_exp.adapters import LoraConfig, LoraModel
from lora_exp.checks import check
from lora_exp.config import Config, conf_folder
from lora_exp.models.unloaded import facts_of, meta_model
from lora_exp.schema import register, to_config

register()
STUDIES = sorted(file.stem for file in (conf_folder() / "study").glob("*.yaml"))


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


@pytest.mark.parametrize("name", [name for name in STUDIES if name != "a_against_a"])
def test_its_sizes_are_those_of_a_scale(name: str) -> None:
    here, there = config(f"+study={name}"), config(f"+study={name}", "scale=gpu")
    check(there)
    assert (here.model.label, there.model.label) == ("smollm2_135m", "mistral_7b")
    assert (here.data.block_size, there.data.block_size, there.train.steps) == (64, 512, 400)
    assert here.study == there.study


@pytest.mark.parametrize("name", STUDIES)
def test_it_names_its_own_command_and_experiment(name: str) -> None:
    text = Path(conf_folder() / "study" / f"{name}.yaml").read_text()
    assert f"python -m lora_exp -m +study={name}\n" in text
    assert config(f"+study={name}").tracking.experiment == name


@pytest.mark.parametrize(
    ("model", "arms"),
    [("smollm2_135m", ("attention", "mlp", "all")), ("mistral_7b", ("attention_7b", "mlp_7b", "all"))],
)
def test_where_to_adapt_compares_equal_numbers_of_values(model: str, arms: tuple[str, ...]) -> None:
    counts = []
    for arm in arms:
        made = config("task=plan", f"model={model}", f"+where={arm}")
        base = meta_model(facts_of(made.model), made.model, torch.bfloat16)
        wanted = LoraConfig(rank=made.rank, target_modules=list(made.targets or []))
        counts.append(LoraModel(base, wanted, verbose=False).parameter_counts()[0])
    assert max(counts) < 1.025 * min(counts)
