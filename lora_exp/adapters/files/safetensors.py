"""One safetensors file: an adapter alone, or the whole model with the adapter merged in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lora_exp.adapters.config import Json, LoraConfig
from lora_exp.adapters.files.whole import write_whole
from lora_exp.adapters.surgery.undo import values_undone_on_failure
from lora_exp.errors import UserError

_CONFIG_KEY = "lora_config"
# What decides an adapter's function beside its tensors; the rest says where it is and how it is trained.
_MEANING = ("lora_alpha", "use_rslora", "variant", "bias", "alpha_pattern", "rank", "rank_pattern")


def save_adapter(path: str | Path, tensors: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Write an adapter's parameters, in the library's own names and layout, with its config."""
    write_tensors(path, tensors, {_CONFIG_KEY: json.dumps(config.to_dict())})


def load_adapter(path: str | Path, into: Mapping[str, Tensor], config: LoraConfig) -> None:
    """Read such a file into an adapter's parameters; the file must fit exactly."""
    tensors, metadata = read_tensors(path)
    _check_config(path, metadata, config)
    copy_strictly(path, tensors, into)


def copy_strictly(path: str | Path, tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy tensors by name, all or none; whatever does not fit is reported together, before any copy."""
    problems = [*_name_problems(tensors, into), *_value_problems(tensors, into)]
    if problems:
        raise UserError(
            f"{path} does not fit this adapter: {'; '.join(problems[:6])}; load it with the config that it "
            "was trained with, onto the same base model"
        )
    with torch.no_grad(), values_undone_on_failure(*into.values()):
        for name, target in into.items():
            target.copy_(tensors[name])


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file, whole or not at all; tensors that share memory are written once each.

    The same content makes the same bytes.
    """
    own = {name: _owned(tensor) for name, tensor in tensors.items()}

    def write(partial: Path) -> None:
        save_file(own, str(partial), metadata={"format": "pt", **metadata})
        _sort_metadata(partial)

    write_whole(path, write)


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU."""
    if not Path(path).is_file():
        raise UserError(f"{path} is not there or not a file; check the path")
    try:
        with safe_open(str(path), "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read ({error}); it is damaged or cut short, copy it anew") from error


def read_json(text: str, source: str) -> Json:
    """An object out of JSON that somebody else may have written."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{source} is not valid JSON ({error}); copy the adapter anew") from error
    if not isinstance(found, dict):
        raise UserError(f"{source} is not a JSON object but {type(found).__name__}; copy the adapter anew")
    return found


def _name_problems(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> Iterable[str]:
    if missing := sorted(set(into) - set(tensors)):
        yield f"missing: {_some(missing)}"
    if unexpected := sorted(set(tensors) - set(into)):
        yield f"unexpected: {_some(unexpected)}"


def _value_problems(tensors: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> Iterable[str]:
    """Shapes first: a file may declare a tensor of any size that is nowhere in memory."""
    for name in sorted(set(into) & set(tensors)):
        value, target = tensors[name], into[name]
        if value.shape != target.shape:
            yield f"{name} is {tuple(value.shape)}, not {tuple(target.shape)}"
        elif value.is_floating_point() != target.is_floating_point() or value.is_complex() or not _is_dense(value):
            yield f"{name} holds {value.dtype}, not {target.dtype}"
        elif not target.is_meta and value.is_floating_point() and not value.to(target.dtype).isfinite().all():
            yield f"{name} holds NaN or infinity in {target.dtype}"


def _is_dense(value: Tensor) -> bool:
    return value.layout is torch.strided and not value.is_quantized and not value.is_meta


def _sort_metadata(path: Path) -> None:
    """safetensors writes its metadata in another order each time."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) <= length:  # as it always is, unless another writer escapes otherwise
            file.seek(8)
            file.write(text.ljust(length))


def _owned(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor with memory of its own, as safetensors wants it."""
    own = tensor.detach().to("cpu").contiguous()
    return own.clone() if own.data_ptr() == tensor.data_ptr() else own


def _check_config(path: str | Path, metadata: Mapping[str, str], config: LoraConfig) -> None:
    if _CONFIG_KEY not in metadata:
        raise UserError(f"{path} was not written by save_model; load PEFT's files with from_pretrained")
    stored = read_json(metadata[_CONFIG_KEY], f"the config in {path}")
    stored = {"variant": "dora" if stored.get("use_dora") else "lora", **stored}  # older files name none
    ours = config.to_dict()
    if differing := [key for key in _MEANING if not _same(stored.get(key), ours[key])]:
        listed = ", ".join(f"{key} {stored.get(key)!r} there, {ours[key]!r} here" for key in differing)
        raise UserError(f"{path} holds another kind of adapter ({listed}); make this one with the same config")


def _same(one: object, other: object) -> bool:
    """Patterns in another order are other patterns: the first that matches a layer counts."""
    return bool(one == other) and (not (isinstance(one, dict) and isinstance(other, dict)) or list(one) == list(other))


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
