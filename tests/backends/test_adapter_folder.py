"""The folder a run leaves: it names its base as others know it, has its tokenizer, and loads without false alarms."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp import LoraModel
from lora_exp.backends import Origin, adapt
from lora_exp.config import Config, conf_folder
from lora_exp.machine.cache import file_sha256
from lora_exp.schema import register, to_config

register()
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft


def config(*overrides: str) -> Config:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        return to_config(compose("config", list(overrides)))


def base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def adapter_config(folder: Path) -> dict[str, Any]:
    stored: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return stored


@pytest.mark.parametrize(
    "overrides", [["backend=native"], ["backend=peft"], ["adapter=full"], ["adapter=full", "targets=[q_proj]"]]
)
def test_the_tokenizer_comes_along(overrides: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    adapted = adapt(base(tiny_llama), config(*overrides), Origin("ORG/NAME", "abc", lambda: tokenizer))
    old = os.umask(0o022)
    try:
        adapted.save(tmp_path / "adapter")
    finally:
        os.umask(old)
    again = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    text = "And the king said unto the people"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert set(modes.values()) == {0o644}, modes


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_the_base_has_its_hub_name_where_it_has_one(backend: str, tiny_llama: Path, tmp_path: Path) -> None:
    wish = config(f"backend={backend}")
    adapt(base(tiny_llama), wish, Origin("ORG/NAME")).save(tmp_path / "named")
    assert adapter_config(tmp_path / "named")["base_model_name_or_path"] == "ORG/NAME"
    assert str(tiny_llama) not in "".join(
        p.read_text() for p in (tmp_path / "named").glob("*.[jm][sd]*") if "tensors" not in p.name
    )
    adapt(base(tiny_llama), wish).save(tmp_path / "own")
    assert adapter_config(tmp_path / "own")["base_model_name_or_path"] == str(tiny_llama)
    peft.PeftModel.from_pretrained(base(tiny_llama), str(tmp_path / "named"))


def test_a_folder_of_the_hubs_cache_is_its_name(tiny_llama: Path, tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = tmp_path / "models--ORG--some-Name" / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_llama)
    adapt(base(snapshot), config()).save(tmp_path / "adapter")
    stored = adapter_config(tmp_path / "adapter")
    assert (stored["base_model_name_or_path"], stored["revision"]) == ("ORG/some-Name", commit)
    assert f"`ORG/some-Name` (revision `{commit}`)" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.parametrize("trained", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16])
def test_another_dtype_is_the_same_base(
    trained: torch.dtype, loaded: torch.dtype, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapt(base(tiny_llama, trained), config()).save(tmp_path)
    with caplog.at_level(logging.WARNING):
        LoraModel.from_pretrained(base(tiny_llama, loaded), tmp_path, strict_base=True, verbose=False)
    assert not caplog.records
    other = base(tiny_llama, loaded)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 0.1
    with caplog.at_level(logging.WARNING):
        LoraModel.from_pretrained(other, tmp_path, verbose=False)
    assert len(caplog.records) == 1
    assert "other base weights" in caplog.text


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_a_runs_folder(
    backend: str, cli: Callable[..., Any], tiny_overrides: list[str], tiny_llama: Path, workplace: Path
) -> None:
    done = cli(*tiny_overrides, f"backend={backend}")
    assert done.code == 0, done.err
    (folder,) = (workplace / "outputs/runs").glob("*/*/adapter")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) == len(AutoTokenizer.from_pretrained(tiny_llama))
    assert adapter_config(folder)["base_model_name_or_path"] == str(tiny_llama)  # the path that the user gave
    digest = file_sha256(tiny_llama / "model.safetensors")
    assert digest[:12] in done.out
    auto = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder))  # all that somebody else needs is in there
    assert auto.get_input_embeddings().weight.shape[0] == len(tokenizer)
    if backend == "native":
        assert f"base_files_sha256 (of the base's weight files): `{digest}`" in (folder / "README.md").read_text()
