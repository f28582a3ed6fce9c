"""A machine's rates: measured once, kept, made anew when damaged; forced answers; what a run is tagged with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lora_exp.adapters.numerics import precision as library
from lora_exp.adapters.numerics.precision import Answers, Rates
from lora_exp.config import MachineConfig
from lora_exp.machine import precision
from lora_exp.machine.precision import take_precision

CPU = torch.device("cpu")
FAST_IN_HALF = Rates(blas=100e9, onednn=120e9, bfloat16=300e9)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """What was measured so far, with a cache of its own, and answers that are put back."""
    asked: list[torch.device] = []
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(precision, "measure", lambda device: asked.append(device) or FAST_IN_HALF)
    monkeypatch.setattr(library, "_told", library._told)
    for name in ("LORA_EXP_BF16", "LORA_EXP_FLOAT32"):
        monkeypatch.delenv(name, raising=False)
    return asked


def kept(folder: Path) -> Path:
    (file,) = (folder / "cache/machine").iterdir()
    return file


def test_it_is_measured_once_a_machine(measured: list[torch.device], tmp_path: Path) -> None:
    first, second = (take_precision(MachineConfig(), CPU) for _ in range(2))
    assert measured == [CPU]
    assert first == second
    assert first.rates == FAST_IN_HALF
    assert first.answers == library.answers() == Answers("native", "onednn")
    assert json.loads(kept(tmp_path).read_text())["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"flop_per_s": {"blas": 1}}', '{"flop_per_s": 3}', "\0" * 200])
def test_a_damaged_file_is_made_anew(measured: list[torch.device], tmp_path: Path, content: str) -> None:
    take_precision(MachineConfig(), CPU)
    whole = kept(tmp_path).read_text()
    kept(tmp_path).write_text(content)
    assert take_precision(MachineConfig(), CPU).rates == FAST_IN_HALF
    assert len(measured) == 2
    assert kept(tmp_path).read_text() == whole


def test_without_a_cache_to_write_it_is_measured_all_the_same(
    measured: list[torch.device], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LORA_EXP_CACHE", str(tmp_path / "file" / "cache"))
    assert take_precision(MachineConfig(), CPU).rates == FAST_IN_HALF


@pytest.mark.parametrize("bf16", ["native", "float32", "float32_few"])
@pytest.mark.parametrize("float32", ["blas", "onednn"])
def test_forced_answers_hold(measured: list[torch.device], bf16: str, float32: str) -> None:
    found = take_precision(MachineConfig(bf16=bf16, float32=float32), CPU)
    assert found.answers == library.answers() == Answers(bf16, float32)
    rate = {"blas": 100e9, "onednn": 120e9}[float32]
    assert found.rate(torch.float32) == rate
    assert found.rate(torch.bfloat16) == (300e9 if bf16 == "native" else rate)


def test_the_config_wins_over_the_environment(measured: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_EXP_BF16", "float32")
    assert take_precision(MachineConfig(), CPU).answers.bf16 == "float32"
    assert take_precision(MachineConfig(bf16="native"), CPU).answers.bf16 == "native"


def test_a_runs_tags_are_what_it_takes_to_repeat_it(measured: list[torch.device]) -> None:
    tags = take_precision(MachineConfig(), CPU).tags()
    assert tags["machine.bf16"] == "native"
    assert tags["machine.float32"] == "onednn"
    assert tags["machine.gflops_bfloat16"] == "300"
    assert tags["machine.threads"] == str(torch.get_num_threads())
    assert "cores" in tags["machine.device"]
