"""What makes two jobs the same: everything that their result follows from, and nothing of where they run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lora_exp
from lora_exp.adapters.numerics.precision import Answers
from lora_exp.config import (
    AdapterConfig,
    Config,
    MachineConfig,
    ModelConfig,
    PlanConfig,
    QuantizationConfig,
    SweepConfig,
    TrackingConfig,
    TrainConfig,
)
from lora_exp.data.kinds import chat as chats
from lora_exp.data.kinds import text as texts
from lora_exp.identity import job_identity
from lora_exp.machine.place import Place

Text: Any = texts.Text  # its fields are known when it is registered
Chat: Any = chats.Chat
CPU = Place(torch.device("cpu"), torch.float32)
ANSWERS = Answers(bf16="float32", float32="blas")


@pytest.fixture
def config(tmp_path: Path, tiny_llama: Path) -> Config:
    (tmp_path / "verses.txt").write_text("And the ox said unto the lamb, go thou and sing.\n" * 40)
    shutil.copytree(tiny_llama, tmp_path / "base")
    return Config(
        model=ModelConfig(path=str(tmp_path / "base")),
        data=Text(label="t", path=str(tmp_path / "verses.txt")),
        quantization=QuantizationConfig("none"),
    )


def digest(config: Config, place: Place = CPU, answers: Answers = ANSWERS, processes: int = 1) -> str:
    found = job_identity(config, place, answers, processes)
    assert found is not None
    return found.digest


SAME: dict[str, Callable[[Config], dict[str, Any]]] = {
    "tracking": lambda config: {"tracking": TrackingConfig(enabled=False, experiment="x", run_name="y")},
    "the sweep's own settings": lambda config: {"sweep": SweepConfig(reuse=True)},
    "what it is resumed from": lambda config: {"resume": "auto"},
    "a look before training": lambda config: {"plan": PlanConfig(gpu_gib=4, check=False)},
    "a forced answer that is the machine's": lambda config: {"machine": MachineConfig(bf16="float32")},
    "how often it is saved": lambda config: {"train": replace(config.train, save_every=1, keep_checkpoints=5)},
    "labels": lambda config: {
        "model": replace(config.model, label="l"), "data": Text(label="u", path=config.data.path),
    },
    "alpha as it is spelt": lambda config: {"alpha": "2r"},  # of rank 8, as 16 is
    "the cache": lambda config: {"model": replace(config.model, cache_dir="c")},
}  # fmt: skip
OTHER: dict[str, Callable[[Config], dict[str, Any]]] = {
    "seed": lambda config: {"seed": 1},
    "rank": lambda config: {"rank": 4},
    "steps": lambda config: {"train": replace(config.train, steps=25)},
    "evaluated rows": lambda config: {"train": replace(config.train, eval_blocks=4)},
    "the kind's own field": lambda config: {"data": Text(label="t", path=config.data.path, block_size=16)},
    "weights of files": lambda config: {"data": Text(label="t", path={config.data.path: 2.0})},
    "backend": lambda config: {"backend": "peft"},
    "options": lambda config: {"adapter": AdapterConfig("lora", "lora", options={"x": 1})},
}


@pytest.mark.parametrize("what", SAME)
def test_where_it_runs_is_no_part_of_it(what: str, config: Config) -> None:
    assert digest(replace(config, **SAME[what](config))) == digest(config)


@pytest.mark.parametrize("what", OTHER)
def test_what_its_result_follows_from_is(what: str, config: Config) -> None:
    assert digest(replace(config, **OTHER[what](config))) != digest(config)


def test_a_rank_has_no_meaning_where_nothing_is_added(config: Config) -> None:
    full = replace(config, adapter=AdapterConfig("full", trains="weights"))
    assert digest(replace(full, rank=4, alpha=7, dropout=0.5)) == digest(full)


def test_data_are_told_by_what_they_hold(config: Config, tmp_path: Path) -> None:
    before = digest(config)
    shutil.copy(config.data.path, tmp_path / "moved.txt")
    assert digest(replace(config, data=Text(label="t", path=str(tmp_path / "moved.txt")))) == before
    Path(config.data.path).write_text("other")
    assert digest(config) != before
    assert digest(replace(config, data=Text(label="t", path=str(tmp_path / "moved.txt")))) == before


def test_folders_of_data_are_told_by_their_files(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    (folder / "inner").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    config = replace(config, data=Text(label="t", path=str(folder)))
    before = digest(config)
    (folder / "inner/b.txt").write_text("b")
    assert digest(config) != before


def test_a_held_out_file_and_a_template_count(config: Config, tmp_path: Path) -> None:
    rows, template = tmp_path / "chat.jsonl", tmp_path / "layout.jinja"
    rows.write_text("{}")
    template.write_text("one")
    chat = Chat(label="c", path=str(rows), validation_path=str(rows), template=str(template))
    config = replace(config, data=chat)
    before = digest(config)
    template.write_text("two")
    assert digest(config) != before
    template.write_text("one")
    assert digest(config) == before


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json", "modeling.py"])
def test_a_base_is_told_by_its_files(name: str, config: Config) -> None:
    before = digest(config)
    (Path(str(config.model.path)) / "README.md").write_text("words")
    assert digest(config) == before
    file = Path(str(config.model.path)) / name
    file.write_bytes((file.read_bytes() if file.exists() else b"") + b" ")
    assert digest(config) != before


def test_a_base_that_is_not_here_has_none(config: Config) -> None:
    away = replace(config, model=ModelConfig(name="nobody/has-such-a-model"))
    assert job_identity(away, CPU, ANSWERS) is None


def test_another_version_is_another_job(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    before = digest(config)
    monkeypatch.setattr(lora_exp, "__version__", "999")
    assert digest(config) != before


def test_how_bfloat16_is_multiplied_counts_where_there_is_any(config: Config) -> None:
    """Of products in float32 it changes no bit."""
    native, short = Answers(bf16="native", float32="blas"), Place(torch.device("cpu"), torch.bfloat16)
    assert digest(config, CPU, native) == digest(config)
    assert digest(config, short, native) != digest(config, short)
    assert digest(config, short) != digest(config)
    assert digest(config, answers=Answers(bf16="float32", float32="onednn")) != digest(config)
    stored = replace(config, quantization=QuantizationConfig("nf4"))  # whose products are in bfloat16
    assert digest(stored, CPU, native) != digest(stored)
    cuda = Place(torch.device("cuda"), torch.float32)
    assert digest(config, cuda) != digest(config)
    assert digest(config, cuda, Answers(bf16="native", float32="onednn")) == digest(config, cuda)


def test_so_do_several_processes(config: Config) -> None:
    assert digest(config, processes=2) != digest(config)


def test_a_plugin_is_told_by_its_source(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "of_a_user"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "beside.py").write_text("FACTOR = 1\n")
    (tmp_path / "alone_of_a_user.py").write_text("import helping_a_user\nimport json\n")
    (tmp_path / "helping_a_user.py").write_text("FACTOR = 1\n")
    (tmp_path / "of_nobody.py").write_text("FACTOR = 1\n")
    changes = {"of_a_user": package / "beside.py", "alone_of_a_user": tmp_path / "helping_a_user.py"}
    for name, changed in changes.items():
        config = replace(config, plugins=[name])
        __import__(name)
        before = digest(config)
        (tmp_path / "of_nobody.py").write_text(f"FACTOR = {name!r}\n")
        assert digest(config) == before
        changed.write_text("FACTOR = 2\n")
        assert digest(config) != before
    for name in (*changes, "helping_a_user"):
        del sys.modules[name]


def test_defaults_of_the_training_are_settings_too(config: Config) -> None:
    found = job_identity(config, CPU, ANSWERS)
    assert found is not None
    assert found.parts["settings"]["train.schedule"] == TrainConfig().schedule
    assert not [key for key in found.parts["settings"] if key.startswith(("tracking", "sweep", "serve", "export"))]
