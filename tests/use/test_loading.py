"""A finished run's model is the one that was trained: on the run's own rows it finds what the run did, to the bit."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Train = Callable[..., Path]
Use = Callable[..., Any]
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


def same(use: Use, run: Path, *more: str) -> dict[tuple[str, str, str], dict[str, float]]:
    """The lines of an evaluation, which is equal to what the run found before it trained and at its end."""
    lines = use("task=evaluate", f"run={run}", "tracking=none", *more).lines
    result = json.loads((run / "result.json").read_text())["result"]
    (label,) = {data for _, _, data in lines}
    assert lines["A", "adapted", label]["loss"] == result["eval_loss"]
    assert lines["base", "base", label]["loss"] == result["eval_loss_before"]
    assert result["eval_loss"] != result["eval_loss_before"]
    for name, value in result["metrics"].items():
        assert lines["A", "adapted", label][name] == value
    return lines


@pytest.mark.parametrize(
    "overrides",
    [
        ("adapter=lora",),
        ("adapter=dora", "bias=all", "layer=all", "targets=all-linear"),
        ("start=pissa", "scaling=standard"),
        ("adapter=vera", "rank=16"),
        ("model.modules_to_save=[lm_head]",),
        ("trainer=hf",),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_adapter(overrides: tuple[str, ...], train: Train, use: Use) -> None:
    lines = same(use, train("one", *overrides))
    assert lines["A", "merged", "text"]["loss"] == pytest.approx(lines["A", "adapted", "text"]["loss"], abs=1e-5)


@pytest.mark.parametrize("adapter", ["full", "head"])
def test_weights_of_the_base_itself(adapter: str, train: Train, use: Use) -> None:
    own = ["model.modules_to_save=[lm_head]"] if adapter == "head" else []
    lines = same(use, train("one", f"adapter={adapter}", *own))
    assert ("A", "merged", "text") not in lines


def test_peft_s_adapter_is_read_as_ours(train: Train, use: Use, result_of: Any) -> None:
    run = train("one", "backend=peft", "adapter=dora", "bias=lora_only")
    lines = use("task=evaluate", f"run={run}", "tracking=none").lines
    assert lines["A", "adapted", "text"]["loss"] == pytest.approx(result_of(run)["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_base(kind: str, train: Train, use: Use, tiny_overrides: list[str], even_llama: Path) -> None:
    pytest.importorskip("bitsandbytes")
    overriding = [each if not each.startswith("model.path") else f"model.path={even_llama}" for each in tiny_overrides]
    same(use, train("one", f"quantization={kind}", overriding=overriding))


def test_bfloat16(train: Train, use: Use) -> None:
    same(use, train("one", "model.dtype=bfloat16"))


@pytest.mark.parametrize("adapter", ["lora", "head", "full"])
def test_a_classifier_of_text(
    adapter: str, train: Train, use: Use, tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path
) -> None:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = {"calm": "the sea rested", "loud": "the ox sang", "odd": "lambs build mountains"}
    names = list(words)
    rows = [{"text": f"{words[names[i % 3]]} {i}", "label": names[i % 3]} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overriding = [
        "model=hf", f"model.path={tiny_llama}", "model.label=tiny", "data=text_classification", f"data.path={file}",
        "data.max_length=16", "data.val_fraction=0.25", "device=cpu", "train.steps=4", "train.warmup_steps=1",
        "train.eval_every=2", "train.eval_blocks=15", "train.micro_batch_size=6",
    ]  # fmt: skip
    lines = same(use, train("one", f"adapter={adapter}", overriding=overriding))
    assert {"accuracy", "macro_f1"} < set(lines["A", "adapted", "text_classification"])


@pytest.mark.parametrize("adapter", ["lora", "head"])
def test_a_classifier_of_images(adapter: str, train: Train, use: Use, tmp_path_factory: pytest.TempPathFactory) -> None:
    from omegaconf import OmegaConf
    from PIL import Image

    from lora_exp.config import PackagedConfig, conf_folder
    from lora_exp.machine.packaged import locate_packaged

    found: Any = OmegaConf.load(conf_folder() / "model/efficientnet_lite0.yaml")
    if locate_packaged(PackagedConfig(**found.packaged)) is None:
        pytest.skip("its package is not installed")

    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for name in ("black", "white"):
        (folder / name).mkdir()
        for index in range(12):
            shade = torch.randint(0, 100, (32, 32, 3), generator=generator) + 150 * (name == "white")
            Image.fromarray(shade.to(torch.uint8).numpy()).save(folder / name / f"{index}.png")
    overriding = [
        "model=efficientnet_lite0", "data=mnist5k", f"data.path={folder}", "data.label=shades", "layer=conv2d",
        "data.image_size=32", "data.train_images=null", "data.val_fraction=0.25", "device=cpu", "train.steps=4",
        "train.warmup_steps=1", "train.eval_every=2", "train.eval_blocks=6", "train.micro_batch_size=4",
    ]  # fmt: skip
    same(use, train("one", f"adapter={adapter}", overriding=overriding))


CHECKPOINTED = ["train.steps=6", "train.eval_every=2", "train.keep_checkpoints=9"]


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("adapter=dora", "bias=all"),
        ("start=pissa", "scaling=standard"),
        ("adapter=vera", "rank=16"),
        ("model.modules_to_save=[lm_head]",),
        ("adapter=full",),
        ("backend=peft", "adapter=dora", "bias=all", "model.modules_to_save=[lm_head]"),
    ],
    ids=lambda value: " ".join(value) or "lora",
)
def test_an_earlier_checkpoint_is_what_was_evaluated_then(overrides: tuple[str, ...], train: Train, use: Use) -> None:
    run = train("one", *CHECKPOINTED, *overrides)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {record["step"]: record["eval/loss"] for record in records if "eval/loss" in record}
    assert len(set(losses.values())) == 4
    for step in (2, 4):
        used = use("task=evaluate", f"run={run}/checkpoints/step_{step:08d}", "tracking=none")
        exactly = pytest.approx(losses[step], rel=1e-6) if "backend=peft" in overrides else losses[step]
        assert used.lines["A", "adapted", "text"]["loss"] == exactly
        assert used.found["runs"]["A"]["step"] == step


def test_a_damaged_checkpoint_is_said(train: Train, cli: Callable[..., Any]) -> None:
    run = train("one", *CHECKPOINTED)
    place = run / "checkpoints/step_00000002"
    (place / "state.json").write_text("{}")
    done = cli("task=evaluate", f"run={place}", "tracking=none")
    assert done.code == 1
    assert "state.json is not what was written): name the run itself" in done.err
    assert "Traceback" not in done.err


def test_runs_of_different_bases_are_refused(train: Train, cli: Callable[..., Any]) -> None:
    one, other = train("one"), train("other", "model.label=another")
    done = cli("task=evaluate", f"run={one}", f"run={other}", "tracking=none")
    assert done.code == 1
    assert "was trained on another" in done.err
    assert "name runs of one base" in done.err


def test_adapters_and_weights_are_not_mixed(train: Train, cli: Callable[..., Any]) -> None:
    one, other = train("one"), train("other", "adapter=full")
    done = cli("task=evaluate", f"run={one}", f"run={other}", "tracking=none")
    assert done.code == 1
    assert "use them one by one" in done.err
