"""One safetensors file: an adapter alone, or the whole model with the adapter merged in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import LoraConfig

_CONFIG_KEY = "lora_config"
# What decides an adapter's function beside its tensors; the rest says where it is and how it is trained.
_MEANING = ("lora_alpha", "use_rslora", "use_dora", "bias", "alpha_pattern", "rank", "rank_pattern")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write an adapter's parameters, in the library's own names and layout, with its config."""
    write_tensors(path, tensors, {_CONFIG_KEY: json.dumps(config.to_dict())})


def load_adapter(path: str | Path, into: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Read such a file into an adapter's parameters; the file must fit exactly."""
    tensors, metadata = read_tensors(path)
    _check_config(path, metadata, config)
    copy_strictly(path, tensors, into)


def copy_strictly(path: str | Path, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors by name; missing, unexpected and misshapen ones are reported together, before any copy."""
    problems = []
    if missing := sorted(set(into) - set(tensors)):
        problems.append(f"missing: {_some(missing)}")
    if unexpected := sorted(set(tensors) - set(into)):
        problems.append(f"unexpected: {_some(unexpected)}")
    for name in sorted(set(into) & set(tensors)):
        if tensors[name].shape != into[name].shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)}, not {tuple(into[name].shape)}")
    if problems:
        raise ValueError(
            f"{path} does not fit this adapter: {'; '.join(problems[:6])}; load it with the config that it "
            "was trained with, onto the same base model"
        )
    with torch.no_grad():
        for name, target in into.items():
            target.copy_(tensors[name])


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write atomically; tensors that share memory are written once each."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    own = {name: _owned(tensor) for name, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(own, str(partial), metadata={"format": "pt", **metadata})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU."""
    if not Path(path).is_file():
        raise ValueError(f"{path} is not there or not a file; check the path")
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read ({error}); it is damaged or cut short, copy it anew") from error


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with memory of its own, as safetensors wants it."""
    own = tensor.detach().to("cpu").contiguous()
    return own.clone() if own.data_ptr() == tensor.data_ptr() else own


def _check_config(path: str | Path, metadata: Mapping[str, str], config: LoraConfig) -> None:
    if _CONFIG_KEY not in metadata:
        raise ValueError(f"{path} was not written by save_model; load PEFT's files with from_pretrained")
    stored: dict[str, Any] = json.loads(metadata[_CONFIG_KEY])
    ours = config.to_dict()
    if differing := [key for key in _MEANING if stored.get(key) != ours[key]]:
        listed = ", ".join(f"{key} {stored.get(key)!r} there, {ours[key]!r} here" for key in differing)
        raise ValueError(f"{path} holds another kind of adapter ({listed}); make this one with the same config")


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
