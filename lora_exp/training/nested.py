"""Nested state, such as an optimizer's, as JSON and tensors by name, and back: nothing is pickled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

_PLAIN = (str, int, float, bool, type(None))


def parted(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """What JSON can hold of ``state``, and its tensors by the path to them.

    A dict becomes ``{"dict": [[key, value], …]}``, as its keys may be numbers, a tuple ``{"tuple": […]}``.
    """
    tensors: dict[str, Tensor] = {}
    return _plain(state, "", tensors), tensors


def joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """What ``parted`` was given."""
    if isinstance(plain, list):
        return [joined(value, tensors) for value in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, value),) = plain.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "tuple":
        return tuple(joined(each, tensors) for each in value)
    return {joined(key, tensors): joined(each, tensors) for key, each in value}


def packed(state: Any) -> bytes:
    """``state`` as bytes, for another process."""
    plain, tensors = parted(state)
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, {"plain": json.dumps(plain)})


def unpacked(given: bytes) -> Any:
    """What ``packed`` was given."""
    length = int.from_bytes(given[:8], "little")  # of safetensors' header
    plain = json.loads(given[8 : 8 + length])["__metadata__"]["plain"]
    return joined(json.loads(plain), load(given))


def _plain(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        while path in tensors:  # of the keys 1 and "1"
            path += "'"
        tensors[path] = value
        return {"tensor": path}
    if isinstance(value, Mapping):
        return {"dict": [[_key(key), _plain(each, f"{path}/{key}", tensors)] for key, each in value.items()]}
    if isinstance(value, (list, tuple)):
        listed = [_plain(each, f"{path}/{i}", tensors) for i, each in enumerate(value)]
        return {"tuple": listed} if isinstance(value, tuple) else listed
    if isinstance(value, _PLAIN):
        return value
    raise TypeError(f"{path} is a {type(value).__name__}, which a checkpoint cannot hold")


def _key(key: Any) -> Any:
    if isinstance(key, _PLAIN):
        return key
    raise TypeError(f"a key is a {type(key).__name__}, which a checkpoint cannot hold")
