"""What an adapter of a model consists of, by dotted name without the adapter's own."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor, nn

from lora_exp.adapters.inspection.traversal import (
    base_modules,
    biased_modules,
    joined,
    lora_layers,
    own_parameter,
    saved_modules,
)

_Tensor = TypeVar("_Tensor", bound=Tensor)


def factor_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What trains of the adapter's layers: `layer.lora_A`, `layer.lora_B` and, for DoRA, `layer.magnitude`."""
    found: dict[str, nn.Parameter] = {}
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters:
            own = layer.adapter_named(name).trained_parameters()
            found.update((joined(layer_name, key), value) for key, value in own.items())
    return found


def fast_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """What LoRA+ trains at a higher rate, as PEFT chooses it: B, magnitudes, biases and vectors of modules to save.

    Nothing of an embedding, in which A is the factor that starts at zero; nothing at all of an adapter without B.
    """
    found: dict[str, nn.Parameter] = {}
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters and layer.takes_dropout:  # no embedding
            adapter = layer.adapter_named(name)
            own = adapter.trained_parameters()
            found.update((joined(layer_name, key), value) for key, value in own.items() if key in adapter.fast)
    if not found:
        return {}
    saved = {key: value for key, value in saved_tensors(model, name).items() if isinstance(value, nn.Parameter)}
    vectors = {key: value for key, value in saved.items() if value.dim() == 1}
    return without_repeats({**found, **bias_parameters(model, name), **vectors})


def factor_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """All that the adapter's layers are made of, frozen or not; what several share stands under each name."""
    found: dict[str, Tensor] = {}
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters:
            own = layer.adapters[name].state_dict(keep_vars=True)
            found.update((joined(layer_name, key), value) for key, value in own.items())
    return found


def bias_parameters(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """`module.bias` of every trained bias; one that modules share has each module's name."""
    trained_by_base: dict[int, nn.Parameter] = {}
    for _, owner, trained in biased_modules(model):
        if name in trained.values:
            trained_by_base[id(own_parameter(owner, "bias"))] = trained.values[name]
    found: dict[str, nn.Parameter] = {}
    for module_name, module in base_modules(model) if trained_by_base else ():
        if (shared := trained_by_base.get(id(own_parameter(module, "bias")))) is not None:
            found[joined(module_name, "bias")] = shared
    return found


def saved_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """Parameters and buffers of the modules that the adapter trains in full, under their own names."""
    found: dict[str, Tensor] = {}
    for module_name, switch in saved_modules(model):
        if name in switch.copies:
            own = switch.copies[name].state_dict(keep_vars=True)
            found.update((joined(module_name, key), value) for key, value in own.items())
    return found


def base_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The base's own parameters, adapters and copies left out."""
    return [p for _, module in base_modules(model) for p in module._parameters.values() if p is not None]


def without_repeats(parameters: dict[str, _Tensor]) -> dict[str, _Tensor]:
    """The first name of each tensor only."""
    first = {id(value): key for key, value in reversed(parameters.items())}
    return {key: value for key, value in parameters.items() if first[id(value)] == key}
