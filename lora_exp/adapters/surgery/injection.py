"""Turning layers of a model into adapted layers, in place.

A layer keeps its identity: only its class changes, so its weights are shared by nature, hooks and tied
parameters stay what they are, and nothing is allocated but the adapter.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable

from torch import nn

from lora_exp.adapters.config import LoraConfig
from lora_exp.adapters.inspection.traversal import base_modules
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.modules_to_save import add_copies
from lora_exp.adapters.layers.registry import adapted_class, layer_class_for, rebind
from lora_exp.adapters.layers.trained_biases import add_biases, trained_owners
from lora_exp.adapters.numerics.packed_weights import keep_trainable
from lora_exp.adapters.routing.route import Route
from lora_exp.adapters.starts.registry import make_start
from lora_exp.adapters.starts.start import NOTHING, Beginning, Given
from lora_exp.adapters.surgery.left_out import say_left_out, stacks_left_out
from lora_exp.adapters.surgery.targets import Targets, find_targets, parents, saved_names, value_for
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant_class
from lora_exp.errors import UserError

log = logging.getLogger(__name__)


def inject(model: nn.Module, config: LoraConfig, name: str, route: Route, given: Given = NOTHING) -> Targets:
    """Add the adapter `name` wherever `config` wants it in `model`; all checks come first."""
    modules = dict(base_modules(model))
    targets = find_targets(model, modules, config)
    _check_ranks(targets.layers, config)
    kind = variant_class(config.variant, config.variant_options)
    saved = saved_names(modules, config)
    owners = trained_owners(_outside(modules, saved), set(targets.layers), config)
    keep_trainable(model)
    layers = {layer_name: adopted(module, route) for layer_name, module in targets.layers.items()}
    begin = _beginnings(layers, config, given)
    placed = [(layer, make_adapter(config, name, layer_name, layer)) for layer_name, layer in layers.items()]
    kind.share(placed)
    for (layer, adapter), layer_name in zip(placed, layers, strict=True):
        adapter.beginning = begin(layer_name)
        layer.add_adapter(adapter)
    add_biases(owners, name, route)
    add_copies(model, saved, name, route)
    _call_instead_of_fuse(modules, [*targets.layers, *saved, *(owner for owner, _, _ in owners)])
    if targets.skipped:
        some = "; ".join(f"{layer}: {reason}" for layer, reason in list(targets.skipped.items())[:3])
        log.warning("%d layers cannot be adapted and stay as they are, such as %s", len(targets.skipped), some)
    say_left_out(stacks_left_out(modules, config, targets))
    return targets


def adopted(module: nn.Module, route: Route) -> LoRALayerBase:
    """`module` itself, as an adapted layer."""
    if isinstance(module, LoRALayerBase):
        return module
    kind = layer_class_for(module)
    assert kind is not None
    module.__class__ = adapted_class(kind, type(module))
    assert isinstance(module, LoRALayerBase)
    module.adopt(route)
    rebind(module)
    return module


def make_adapter(config: LoraConfig, name: str, layer_name: str, layer: LoRALayerBase) -> LoraAdapter:
    rank = int(value_for(layer_name, config.rank_pattern, config.rank))
    alpha = value_for(layer_name, config.alpha_pattern, config.lora_alpha)
    dropout = config.lora_dropout if layer.takes_dropout else 0.0  # PEFT drops no indices either
    kind, key = variant_class(config.variant, config.variant_options), zlib.crc32(layer_name.encode())
    return kind(name, rank, alpha, dropout, config.use_rslora, key, **config.variant_options)


def _beginnings(layers: dict[str, LoRALayerBase], config: LoraConfig, given: Given) -> Callable[[str], Beginning]:
    """How each layer's adapter begins, by the layer's name, after a look whether it can."""
    start, kind = make_start(config.start, config.start_options), variant_class(config.variant, config.variant_options)
    if config.start != LoraConfig.start and not vars(kind).get("takes_starts", False):
        raise UserError(
            f"start={config.start!r} is not for variant={config.variant!r}, whose parameters begin in a way of their "
            "own; leave start out"
        )
    if given.fills:
        start.check(layers, {n: int(value_for(n, config.rank_pattern, config.rank)) for n in layers})
    return lambda layer_name: Beginning(start, layer_name, given)


def _outside(modules: dict[str, nn.Module], saved: list[str]) -> dict[str, nn.Module]:
    inside = tuple(f"{name}." for name in saved)
    return {name: m for name, m in modules.items() if name not in saved and not name.startswith(inside)}


def _call_instead_of_fuse(modules: dict[str, nn.Module], changed: list[str]) -> None:
    """torch's encoder has a fused path for inference that reads weights without calling the layers."""
    for name in {parent for inner in changed for parent in ["", inner, *parents(inner)]}:
        module = modules.get(name)
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0  # the fused path's own precondition
        elif isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # only the fused path understands them


def _check_ranks(layers: dict[str, nn.Module], config: LoraConfig) -> None:
    above = {}
    for name, module in layers.items():
        kind, rank = layer_class_for(module), int(value_for(name, config.rank_pattern, config.rank))
        assert kind is not None
        if rank > (limit := kind.largest_rank(module)):
            above[name] = (rank, limit)
    if not above:
        return
    name, (rank, limit) = max(above.items(), key=lambda item: item[1][1])
    if len(above) == len(layers):
        raise UserError(
            f"rank={rank} is above the dimensions of every adapted layer (the largest, {name}, has {limit}); "
            f"use a rank of at most {limit}"
        )
    log.warning("rank %d is above the dimensions of %d adapted layers, such as %s", rank, len(above), name)
