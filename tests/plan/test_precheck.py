"""Errors that say that memory ran out, in their many forms, become one with advice."""

from __future__ import annotations

import os

import pytest
import torch

from lora_exp.config import AdapterConfig, Config, QuantizationConfig
from lora_exp.machine.place import Place
from lora_exp.plan.precheck import memory_errors_explained

CPU = Place(torch.device("cpu"), torch.float32)
CONFIG = Config(adapter=AdapterConfig("lora", "lora"), quantization=QuantizationConfig("none"))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried to …"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        OSError(12, os.strerror(12)),
        RuntimeError("can't start new thread"),
        ImportError("_image.so: failed to map segment from shared object"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_they_come_with_advice(error: Exception, wrapped: bool) -> None:
    raised: Exception = error
    if wrapped:
        raised = ValueError("the model could not be loaded. Ways to get it: …")
        raised.__cause__ = error
    with pytest.raises(ValueError, match="Out of memory on cpu") as caught, memory_errors_explained(CONFIG, CPU):
        raise raised
    for advice in ("micro_batch_size", "train.gradient_checkpointing=true", "quantization=nf4", "task=plan"):
        assert advice in str(caught.value)
    assert "Ways to get it" not in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("rank=0"), RuntimeError("out of ideas"), KeyboardInterrupt()])
def test_others_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, memory_errors_explained(CONFIG, CPU):
        raise error
    assert caught.value is error


def test_what_filled_the_memory_is_let_go() -> None:
    import weakref

    held = []

    def step() -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise MemoryError

    with pytest.raises(ValueError, match="Out of memory") as caught, memory_errors_explained(CONFIG, CPU):
        step()
    assert caught.value.__cause__
    assert held[0]() is None
