"""The model as it was before injection: its modules under their own names."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.modules_to_save import SavedModule
from lora_exp.adapters.layers.registry import PARTS, parts_of
from lora_exp.adapters.layers.trained_biases import CHILD, TrainedBiases


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(dotted name, module) of every module of the base, adapters left out, shared modules once."""
    return ((name, module) for name, module in _walk(model) if not isinstance(module, SavedModule))


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoRALayerBase]]:
    """(dotted name, layer) of every adapted layer."""
    return ((name, module) for name, module in _walk(model) if isinstance(module, LoRALayerBase))


def saved_modules(model: nn.Module) -> Iterator[tuple[str, SavedModule]]:
    """(dotted name, switch) of every module that some adapter trains in full."""
    return ((name, module) for name, module in _walk(model) if isinstance(module, SavedModule))


def biased_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, TrainedBiases]]:
    """(dotted name, owner, its trained biases) of every module whose bias some adapter trains."""
    for name, module in _walk(model):
        if isinstance(trained := module._modules.get(CHILD), TrainedBiases):
            yield name, module, trained


def own_parameter(module: nn.Module, key: str) -> nn.Parameter | None:
    """The base's parameter `key` of `module`, also while an adapter is merged into it."""
    kept = weights_kept(module)
    if isinstance(trained := module._modules.get(CHILD), TrainedBiases):
        kept = {**kept, **trained.kept}
    return kept.get(key, module._parameters.get(key))


def weights_kept(module: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own weights of `module` in whose place merged ones are now, by key."""
    return {} if isinstance(module, TrainedBiases) else vars(module).get("kept", {})


def joined(*parts: str) -> str:
    """Dotted name out of parts, where the root's name is empty."""
    return ".".join(part for part in parts if part)


def _walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: dict[int, nn.Module] = {}  # the modules too: a part may live only as long as it is looked at
    stack = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen[id(module)] = module
        yield name, module
        stack.extend(reversed([*_children(name, module)]))


def _children(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(module, SavedModule):
        yield name, module.original
        return
    for child_name, child in module._modules.items():
        is_ours = child_name in (CHILD, PARTS) or (isinstance(module, LoRALayerBase) and child_name == "adapters")
        if child is not None and not is_ours:
            yield joined(name, child_name), child
    for key, part in parts_of(module).items():
        yield joined(name, key), part
