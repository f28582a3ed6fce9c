"""The checks for a GPU, run on the CPU: they pass there, and see what is not as it should be."""

from __future__ import annotations

import json
import math
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from benchmarks.gpu_check import checks, lanes, times
from benchmarks.gpu_check.__main__ import main
from lora_exp.adapters import LoraModel

CPU = ["--device", "cpu", "--rooms", "layers", "lanes", "models"]


def test_the_cpu_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CPU, "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    left_out = [row["case"] for row in found["checks"] if row["said"]]
    assert len(found["checks"]) - len(left_out) > 40
    assert all("vera" in case or "waits" in case for case in left_out)
    assert "0 not" in capsys.readouterr().out


def test_its_environment_has_what_the_harness_needs() -> None:
    """Sweeps are summed up in it, too. Tracking is off, and nothing is exported."""
    needed = {Requirement(each) for each in requires("lora_exp") or () if "extra ==" not in each}
    file = Path(__file__).parents[1] / "benchmarks/gpu_check/requirements.txt"
    here = {Requirement(line) for line in file.read_text().splitlines() if not line.startswith("#")}
    assert {each.name for each in needed - here} == {"mlflow", "gguf"}


def test_a_device_that_computes_otherwise_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    move = LoraModel.to

    def astray(model: LoraModel, *where: object, **options: object) -> LoraModel:
        moved = move(model, *where, **options)  # type: ignore[arg-type]
        for parameter in moved.adapter_parameters().values():
            parameter.data.mul_(1.01)
        return moved

    monkeypatch.setattr(LoraModel, "to", astray)
    assert main(["--device", "cpu", "--rooms", "layers", "--out", str(tmp_path)]) == 1
    bad = {row["case"] for row in json.loads((tmp_path / "gpu.json").read_text())["checks"] if not row["is_good"]}
    assert "lora on linear, float32: outputs and gradients as in float64" in bad
    assert "DoRA fp32 dropout 0 r=8: as PEFT on this device" in bad


def test_what_a_case_can_end_in() -> None:
    def leaves() -> float:
        raise checks.LeftOut("no such thing here")

    def breaks() -> float:
        raise RuntimeError("boom")

    calls = {"good": lambda: 0.1, "bad": lambda: 0.3, "left": leaves, "broken": breaks, "nan": lambda: math.nan}
    found = {one.case: one for one in checks.run("r", [(name, 0.2, call) for name, call in calls.items()])}
    assert [name for name, one in found.items() if one.is_good] == ["good", "left"]
    assert (found["left"].said, found["broken"].said) == ("left out: no such thing here", "RuntimeError: boom")


def test_differences_are_relative_and_never_hide_what_is_not_finite() -> None:
    one = torch.ones(4)
    assert checks.difference(1.5 * one, one) == pytest.approx(0.5)
    assert checks.difference(one, one.reshape(2, 2)) == math.inf
    assert checks.difference(torch.tensor([math.nan] * 4), one) == math.inf
    with pytest.raises(KeyError, match="b"):
        checks.differences({"a": one}, {"a": one, "b": one})


def test_layers_are_timed_against_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(times, "ROUNDS", 2)
    found = times.measure(torch.device("cpu"), ((16, 24),), tokens=8)
    assert len(found["rows"]) == len(list(times.setups())) >= 8
    assert all(row["ratio"] > 0 for row in found["rows"])
    assert {"LoRA fp32 dropout 0", "DoRA bf16 dropout 0.05"} <= set(found["means"])


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([]) == 2
    assert "sees no GPU; --device cpu runs the same checks" in capsys.readouterr().out


def test_lanes_are_timed_each_against_batched() -> None:
    found = lanes.measure(torch.device("cpu"), width=48, rounds=2)
    assert [row["tokens of a lane"] for row in found] == [16, 256]
    assert all(row["ratio"] > 0 for row in found)
