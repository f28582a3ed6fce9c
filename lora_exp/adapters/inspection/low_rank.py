"""An adapter as plain pairs of factors, for formats that know nothing else."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from lora_exp.adapters.inspection.adapter_state import bias_parameters, saved_tensors
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.variants.lora import LoraAdapter

_FORMULAS = ("output", "add_to", "low_rank", "delta_weight", "merged")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """A layer's weight changes by scale * BA, laid out as PEFT does: A (r, in) and B (out, r), or A (r, V) and B (d, r)
    of an embedding. r is twice the rank where a start's product is taken off again. `layer_type`: the library's name.
    """

    A: Tensor
    B: Tensor
    scale: float
    layer_type: str


def low_rank(model: nn.Module, name: str) -> dict[str, LowRank]:
    """By the layers' names, whatever the variant computes its factors from; right where `beyond_low_rank` is empty."""
    found: dict[str, LowRank] = {}
    for layer_name, layer in lora_layers(model):
        if name in layer.adapters:
            adapter = layer.adapter_named(name)
            with torch.no_grad():
                A, B = layer.peft_factors(*adapter.factors(layer)).values()
            found[layer_name] = LowRank(A, B, adapter.scale, layer.layer_type)
    return found


def beyond_low_rank(model: nn.Module, name: str) -> list[str]:
    """What of an adapter no pairs of factors say, in words."""
    found = []
    adapters = [layer.adapter_named(name) for _, layer in lora_layers(model) if name in layer.adapters]
    if other := next((adapter for adapter in adapters if not is_plain(type(adapter))), None):
        found.append(f"{other.title}'s own parameters ({', '.join(_others(other))})")
    if any(layer.is_stack for _, layer in lora_layers(model) if name in layer.adapters):
        found.append("factors on stacked weights of experts")
    if biases := bias_parameters(model, name):
        found.append(f"trained biases ({next(iter(biases))}, {len(biases)} in all)")
    if saved := saved_tensors(model, name):
        found.append(f"modules trained in full ({next(iter(saved))})")
    return found


def is_plain(kind: type[LoraAdapter]) -> bool:
    """Whether the variant's formulas are LoRA's, so that it may differ in how it comes to its factors alone."""
    return all(getattr(kind, formula) is getattr(LoraAdapter, formula) for formula in _FORMULAS)


def _others(adapter: LoraAdapter) -> list[str]:
    return [key for key, _ in adapter.named_parameters() if key not in ("lora_A", "lora_B")] or ["its formula"]
