"""The base model as it was before injection: its modules and parameters under their own names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from .layer import LoRALayerBase


def base_modules(model: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every module of the base, adapters left out, shared modules once."""
    seen: set[int] = set()
    stack = [(name, model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield name, module
        for child_name, child in reversed(list(_base_children(module))):
            stack.append((joined(name, child_name), child))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayerBase]]:
    """(dotted name, layer) of every adapted layer."""
    for name, module in base_modules(model):
        if isinstance(module, LoRALayerBase):
            yield name, module


def joined(*parts: str) -> str:
    """Dotted name out of parts, where the root's name is empty."""
    return ".".join(part for part in parts if part)


def _base_children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module._modules.items():
        if child is not None and not (isinstance(module, LoRALayerBase) and name == "adapters"):
            yield name, child
