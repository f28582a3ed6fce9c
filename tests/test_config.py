"""The config surface: what composes, what is refused, and what a run is listed by."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

from lora_exp.checks import check
from lora_exp.config import Config, ConfigError, conf_folder, resolve_alpha, scale_of
from lora_exp.determining import settings
from lora_exp.listed import flat_values
from lora_exp.schema import register, to_config

register()
GROUPS = sorted(folder.name for folder in conf_folder().iterdir() if folder.is_dir() and folder.name != "hydra")
CHOICES = [(file.parent.name, file.stem) for group in GROUPS for file in sorted((conf_folder() / group).glob("*.yaml"))]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return compose("config", list(overrides))


def config(*overrides: str) -> Config:
    return to_config(composed(*overrides))


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=[f"{group}={choice}" for group, choice in CHOICES])
def test_every_yaml_composes_converts_and_passes_the_checks(group: str, choice: str) -> None:
    vision = ["model=efficientnet_lite0", "data=mnist5k", "layer=conv2d"]
    own, classes = f"data.path={Path(__file__).parents[1] / 'README.md'}", ["data=bbc_news"]
    needed = {
        "model=hf": ["model.name=org/model"],
        "data=text": [own],
        "data=chat": ["data.name=org/set"],
        "data=text_classification": ["data.name=org/set"],
        "model=minilm": classes,
        "model=encoder": [*classes, "model.name=org/model"],
        "adapter=head": vision,
        "adapter=peft_method": ["backend=peft", "adapter.method=IA3"],
        "experiment=peft_suite": ["adapter.method=IA3"],  # which a suite names
        "layer=conv2d": vision,
        "layer=experts": ["model=hf", "model.name=org/model"],
        "data=mnist5k": vision,
        "model=efficientnet_lite0": vision,
    }
    needed |= {f"quantization={name}": ["task=plan"] for name in ("nf4", "fp4", "int8")}
    needed["prune=wilcoxon"] = ["task=plan"]  # hydra/sweeper=optuna holds Optuna at a version before it
    plus = "+" if group in ("experiment", "scale", "study", "where") else ""
    check(config(f"{plus}{group}={choice}", *needed.get(f"{group}={choice}", [])))


def test_the_defaults_are_those_the_documentation_names() -> None:
    default = config()
    assert (default.rank, default.alpha, default.scaling.name, default.adapter.name) == (8, 16, "rslora", "lora")
    assert (default.layer.name, default.backend, default.device) == ("linear", "native", "auto")


@pytest.mark.parametrize(("alpha", "value"), [(16, 16), (0.5, 0.5), ("2r", 16), ("r", 8), ("0.5r", 4), ("12", 12)])
def test_alpha_is_a_number_or_a_multiple_of_the_rank(alpha: object, value: float) -> None:
    assert resolve_alpha(alpha, rank=8) == value


@pytest.mark.parametrize("alpha", ["x", "2q", 0, -1, "0r", None, True, math.nan, math.inf, ""])
def test_any_other_alpha_is_refused_with_its_value(alpha: object) -> None:
    with pytest.raises(ValueError, match=f"alpha={alpha}"):
        resolve_alpha(alpha, rank=8)


@pytest.mark.parametrize("rank", [1, 4, 64])
def test_rslora_is_standard_scaling_times_the_root_of_the_rank(rank: int) -> None:
    standard, rslora = (scale_of(config(f"rank={rank}", f"scaling={rule}")) for rule in ("standard", "rslora"))
    assert rslora / standard == pytest.approx(math.sqrt(rank))


def test_all_problems_are_reported_together() -> None:
    wrong = config("rank=0", "dropout=1.0", "bias=some", "train.steps=0", "seed=-1", "optimizer.lr=-1")
    with pytest.raises(ConfigError) as caught:
        check(wrong)
    for value in ("rank=0", "dropout=1.0", "bias=some", "train.steps=0", "seed=-1", "optimizer.lr=-1"):
        assert value in str(caught.value)


@pytest.mark.parametrize(
    "override", ["rank=3.5", "rank=eight", "dropout=high", "train.steps=many", "rnak=8", "adapter=lroa"]
)
def test_a_wrong_type_or_an_unknown_name_fails_at_composition(override: str) -> None:
    with pytest.raises(ConfigCompositionException):
        composed(override)


def test_a_value_that_is_not_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"data\.label=VALUE"):
        to_config(composed("data.label=???"))


def test_data_without_a_place_says_how_to_name_one() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=FILE_OR_FOLDER"):
        check(config("data=text"))


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_PASSWORD") as caught:
        check(config("tracking.uri='https://me:hunter2@server'"))
    assert "hunter2" not in str(caught.value)


def test_what_is_done_with_finished_runs_is_no_part_of_a_training() -> None:
    plain = config()
    asked = ["export=gguf", "export.texts=9", "best.metric=eval/accuracy", "evaluate.split=test"]
    other = config(*asked, "generate.prompt=Hello", "serve.port=9")
    assert other != plain
    assert flat_values(other) == flat_values(plain)
    assert settings(other) == settings(plain)


def test_flat_values_are_short_plain_and_name_every_choice() -> None:
    values = flat_values(config("alpha=2r", "rank=4"))
    expected = {"rank": 4, "alpha": 8.0, "scale": 4.0, "scaling": "rslora", "adapter": "lora", "layer": "linear",
                "quantization": "none", "model": "smollm2_135m", "data": "bible", "seed": 0,
                "optimizer.lr": 1e-3}  # fmt: skip
    assert {key: values[key] for key in expected} == expected
    assert all(isinstance(value, (int, float, str, bool, list, type(None))) for value in values.values())


def test_full_training_is_not_listed_by_a_rank_it_does_not_have() -> None:
    for adapter in ("full", "head"):
        values = flat_values(config(f"adapter={adapter}"))
        assert values["adapter"] == adapter
        assert not {"rank", "alpha", "scale", "dropout", "adapter.trains"} & set(values)
    assert flat_values(config("adapter=full", "adapter.trains=modules_to_save"))["adapter.trains"] == "modules_to_save"


def test_the_schema_documents_every_key_of_the_yaml(tmp_path: Path) -> None:
    assert set(composed()) == set(Config.__dataclass_fields__)


@pytest.mark.parametrize("task", ["train", "plan"])
def test_a_block_beyond_a_table_of_positions_is_refused_and_one_beyond_rotary_ones_is_not(task: str) -> None:
    check(config("model=gpt2", "data.block_size=1024", f"task={task}"))
    with pytest.raises(ConfigError, match=r"data\.block_size=1025 is more than the 1024 positions of model=gpt2"):
        check(config("model=gpt2", "data.block_size=1025", f"task={task}"))
    with pytest.raises(ConfigError, match="2048 positions of model=opt_67b"):
        check(config("model=opt_67b", "data.block_size=2049", f"task={task}"))
    check(config("model=smollm2_135m", "data.block_size=100000", f"task={task}"))
