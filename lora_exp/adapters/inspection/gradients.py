"""Which adapted layers a backward pass did not reach."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.errors import UserError


def unreached_layers(model: nn.Module, served: Sequence[str]) -> list[str]:
    """Layers with an adapter in `served` of which nothing has a gradient; raises if that is all of them.

    Some may rightly wait (a mixture's expert without a token yet). All of them means that training reads
    the weights without calling the layers, or that the loss does not depend on them.
    """
    dead: dict[str, bool] = {}
    for layer_name, layer in lora_layers(model):
        for name in set(served) & set(layer.adapters):
            adapter = layer.adapter_named(name)
            is_dead = all(parameter.grad is None for parameter in adapter.trained_parameters().values())
            dead[layer_name] = dead.get(layer_name, False) or is_dead
    if all(dead.values()):
        raise UserError(
            f"no adapter got a gradient in the last backward pass (of {', '.join(list(dead)[:5])}); target "
            "layers that the model calls, and with reentrant checkpointing let the embeddings' output "
            "require gradients"
        )
    return [name for name, is_dead in dead.items() if is_dead]
