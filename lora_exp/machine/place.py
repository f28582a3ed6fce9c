"""Where a run computes, and in which dtype."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace

import numpy
import torch

from lora_exp.adapters.numerics.precision import NATIVE, answers
from lora_exp.errors import UserError


@dataclass(frozen=True)
class Place:
    """``dtype`` is the frozen base's; adapters are float32 wherever they are.

    ``autocast`` is the dtype matrix products run in when the base, or what is not quantised of it, is float32.
    """

    device: torch.device
    dtype: torch.dtype
    autocast: torch.dtype | None = None

    def compute(self) -> contextlib.AbstractContextManager[object]:
        """The context of every forward pass."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast)


def resolve_place(device: str, dtype: str, trains_base: bool, quantised: bool = False) -> Place:
    """Turn ``device=auto`` and ``model.dtype=auto`` into what this machine has.

    A ``quantised`` base keeps the rest in float32, so that what lies between its products is autocast as well.
    Raises UserError for a device or dtype it has not.
    """
    chosen = resolve_device(device)
    if quantised:
        plain = resolve_place(device, dtype, trains_base=False)
        return replace(plain, autocast=torch.bfloat16 if plain.dtype == torch.bfloat16 else None)
    if dtype != "auto":
        return Place(chosen, supported_dtype(chosen, dtype))
    native = torch.bfloat16 if computes_bfloat16(chosen) else torch.float32
    if trains_base:  # an AdamW update is lost in bfloat16's 8 bits of mantissa
        return Place(chosen, torch.float32, native if native != torch.float32 else None)
    return Place(chosen, native)


def resolve_device(device: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU. Raises UserError for a device that is not there."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device} is not a device: use auto, cpu, cuda, cuda:N or mps") from None
    present = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    if (chosen.index or 0) >= present.get(chosen.type, 0):
        here = ", ".join(f"{count} {name}" for name, count in present.items() if count)
        raise UserError(f"device={device} is not on this machine (it has: {here}): use device=auto")
    return chosen


def computes_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 matrix products are native *and* the faster choice, which for a CPU is measured."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and answers().bf16 == NATIVE


def set_seed(seed: int) -> None:
    """Seed Python, NumPy and torch on every device. (transformers' own would import PEFT, which takes seconds.)"""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def prepare_backends(place: Place) -> None:
    """Allow TF32 for what is left in float32 on CUDA."""
    if place.device.type == "cuda":
        torch.set_float32_matmul_precision("high")


def supported_dtype(device: torch.device, dtype: str, key: str = "model.dtype") -> torch.dtype:
    """The dtype of this name. Raises UserError, naming the config's ``key``, where ``device`` has it not."""
    if device.type == "cpu" and dtype == "float16":
        raise UserError(f"{key}=float16 trains on a GPU only: use bfloat16 or float32 on the CPU")
    if device.type == "cuda" and dtype == "bfloat16" and not torch.cuda.is_bf16_supported():
        raise UserError(f"{key}=bfloat16 is not on this GPU: use float16 or float32")
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen
