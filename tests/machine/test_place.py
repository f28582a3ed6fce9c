"""Device and dtype: what ``auto`` picks and what is refused."""

from __future__ import annotations

import pytest
import torch

from lora_exp.adapters.numerics.precision import FLOAT32, NATIVE, answered
from lora_exp.machine.place import Place, computes_bfloat16, resolve_device, resolve_place

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def test_auto_takes_cuda_then_mps_then_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == CUDA
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert resolve_device("auto") == CPU


@pytest.mark.parametrize(("native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_the_base_is_bfloat16_where_that_is_native(
    monkeypatch: pytest.MonkeyPatch, native: bool, dtype: torch.dtype
) -> None:
    monkeypatch.setattr("lora_exp.machine.place.computes_bfloat16", lambda _: native)
    assert resolve_place("cpu", "auto", trains_base=False) == Place(CPU, dtype)
    trained = resolve_place("cpu", "auto", trains_base=True)
    assert trained == Place(CPU, torch.float32, torch.bfloat16 if native else None)
    assert resolve_place("cpu", "bfloat16", trains_base=False).dtype == torch.bfloat16


def test_on_a_cpu_the_measured_answer_decides() -> None:
    for bf16 in (NATIVE, FLOAT32):
        with answered(bf16=bf16):
            assert computes_bfloat16(CPU) is (bf16 == NATIVE)
            assert resolve_place("cpu", "auto", trains_base=False).dtype is (
                torch.bfloat16 if bf16 == NATIVE else torch.float32
            )


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "xpu"])
def test_a_device_that_is_not_here_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match=f"device={device} is not"):
        resolve_device(device)
