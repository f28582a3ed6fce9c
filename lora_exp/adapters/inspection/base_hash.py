"""Which base weights an adapter belongs to."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lora_exp.adapters.inspection.traversal import base_modules, own_parameter
from lora_exp.adapters.numerics.fingerprints import Fingerprint
from lora_exp.adapters.numerics.packed_weights import constants


@dataclasses.dataclass(frozen=True)
class Identity:
    """A base's SHA-256, and what the base held when it was computed."""

    sha256: str | None
    values: Fingerprint


@dataclasses.dataclass
class Known:
    """The identity that was found last; models over the same weights may have one in common.

    No part of a model's state: it is looked at anew whether the base still has those values.
    """

    identity: Identity | None = dataclasses.field(default=None, repr=False)


def found(model: nn.Module, known: Identity | None) -> Identity:
    """The identity of `model`'s base: `known`, where it still has those values, else computed anew.

    A base that is shared out among processes (FSDP) is what it was before: no process holds all of it.
    """
    tensors = base_tensors(model)
    if any(hasattr(tensor, "to_local") for tensor in tensors):  # torch's DTensor, which takes long to import
        return known or Identity(None, Fingerprint([]))
    if any(tensor.is_meta for tensor in tensors):
        return Identity(None, Fingerprint([]))
    if known is not None and known.values.holds(tensors):
        return known
    return Identity(base_sha256(model), Fingerprint(tensors))


def base_sha256(model: nn.Module) -> str | None:
    """SHA-256 over the base's parameters: names, shapes and values in bfloat16; None on the meta device.

    The same weights have one identity whether they are loaded in float32 or in bfloat16. float16 rounds
    otherwise, and a quantised copy is another base, packed values and constants included.
    """
    digest = hashlib.sha256()
    for name, (parameter, *its_constants) in _base(model):
        if parameter.is_meta:
            return None
        digest.update(f"{name}:{tuple(parameter.shape)}".encode())
        for tensor in (parameter, *its_constants):
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def base_tensors(model: nn.Module) -> list[Tensor]:
    """The base's parameters, and what it takes to dequantise them."""
    return [tensor for _, parameter in _base(model) for tensor in parameter]


def _base(model: nn.Module) -> Iterator[tuple[str, list[Tensor]]]:
    """(module's name.parameter's key, the base's parameter and what it takes to dequantise it)"""
    for module_name, module in base_modules(model):
        for key in module._parameters:
            if (parameter := own_parameter(module, key)) is not None:
                yield f"{module_name}.{key}", [parameter, *constants(module, parameter)]


def _bytes(parameter: Tensor) -> memoryview:
    """The raw bytes of integers (packed values), those in bfloat16 of floats."""
    flat = parameter.detach().to("cpu").contiguous().reshape(-1)
    flat = flat.to(torch.bfloat16) if flat.is_floating_point() else flat
    return flat.view(torch.uint8).numpy().data
