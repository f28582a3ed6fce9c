"""What this machine computes on, by name."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

_FIELDS = ("model name", "cpu family", "model", "stepping")


def device_name(device: torch.device) -> str:
    """A GPU's name; a processor's with family, model and stepping where there are such, and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor()}, {os.cpu_count()} cores" if device.type == "cpu" else device.type


def _processor() -> str:
    try:
        first = Path("/proc/cpuinfo").read_text().partition("\n\n")[0]
    except OSError:
        return platform.processor() or platform.machine()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
    name, *numbers = (known.get(field) for field in _FIELDS)
    if name is None:
        return platform.machine()
    return " ".join([name, *(f"{field.split()[-1]} {n}" for field, n in zip(_FIELDS[1:], numbers, strict=True) if n)])
