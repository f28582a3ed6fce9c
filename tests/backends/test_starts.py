"""`start=`: from the command line to a folder that PEFT loads onto the untouched base."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_exp.adapters import LoraModel
from lora_exp.adapters.starts.registry import start_names
from lora_exp.config import conf_folder

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
Cli = Callable[..., Any]


def losses(folder: Path) -> tuple[float, float]:
    result = json.loads((folder / "result.json").read_text())["result"]
    return result["eval_loss_before"], result["eval_loss"]


def test_every_start_has_its_choice() -> None:
    assert sorted(file.stem for file in (conf_folder() / "start").glob("*.yaml")) == start_names()


@pytest.mark.parametrize("name", [name for name in start_names() if name != "loftq"])
def test_a_run_learns_and_peft_loads_what_it_leaves(
    name: str, cli: Cli, tiny_llama: Path, tiny_overrides: list[str], workplace: Path
) -> None:
    folder = workplace / "run"
    done = cli(*tiny_overrides, f"start={name}", "tracking=none", "optimizer.lr=0.01", f"hydra.run.dir={folder}")
    assert done.code == 0, done.err
    before, after = losses(folder)
    assert after < before
    tokens = torch.randint(0, 300, (2, 8))
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ours = LoraModel.from_pretrained(base, folder / "adapter", verbose=False)
    torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=1e-4, atol=1e-5)
    assert ours.configs["default"].start == name


def test_loftq_reads_the_weights_of_the_models_own_files(
    cli: Cli, tiny_llama: Path, tiny_overrides: list[str], workplace: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = workplace / "even"
    shutil.copytree(tiny_llama, folder)
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(folder, hidden_size=64, intermediate_size=128, head_dim=16)
    LlamaForCausalLM(config).save_pretrained(folder)
    found = {}
    for name in ("default", "loftq"):
        more = [f"model.path={folder}", "quantization=nf4", f"start={name}", "rank=16", "tracking=none"]
        done = cli(*tiny_overrides, *more, "optimizer.lr=0.01", f"hydra.run.dir={workplace / name}")
        assert done.code == 0, done.err
        found[name] = losses(workplace / name)
    assert found["loftq"][0] != found["default"][0]
    assert found["loftq"][1] < found["loftq"][0]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["start=pissa", "adapter=full"], "start=pissa has no meaning with adapter=full"),
        (["start=olora", "backend=peft"], "start=olora is not with backend=peft"),
        (["start=loftq"], "no adapted layer is quantised"),
        (["start=pissa", "start.options.iteration=3"], "iteration"),
    ],
)
def test_what_cannot_be_is_said(overrides: list[str], says: str, cli: Cli, tiny_overrides: list[str]) -> None:
    done = cli(*tiny_overrides, *overrides, "tracking=none")
    assert done.code != 0
    assert says in done.out + done.err


@pytest.mark.parametrize("name", ["default", "pissa"])
def test_a_plan_counts_what_a_start_leaves(name: str, cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli(*tiny_overrides, "task=plan", f"start={name}", "tracking=none", f"hydra.run.dir={workplace / name}")
    assert done.code == 0, done.err
    planned = json.loads((workplace / name / "result.json").read_text())["result"]
    cli(*tiny_overrides, f"start={name}", "tracking=none", f"hydra.run.dir={workplace / 'run'}")
    size = (workplace / "run/adapter/adapter_model.safetensors").stat().st_size
    assert abs(planned["adapter_bytes"] - size) < 0.2 * size
    trained = 4 * planned["trainable"]
    assert planned["adapter_gib"] * 2**30 == pytest.approx(trained * (2 if name == "pissa" else 1))
