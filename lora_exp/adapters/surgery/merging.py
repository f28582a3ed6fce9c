"""Folding adapters into the base weights, taking them out again, and leaving plain modules behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from lora_exp.adapters.inspection.ties import untied_groups, weight_ties
from lora_exp.adapters.inspection.traversal import (
    base_modules,
    biased_modules,
    joined,
    lora_layers,
    own_parameter,
    saved_modules,
    weights_kept,
)
from lora_exp.adapters.layers.adapted import LoRALayerBase, allow_fast_paths, strip
from lora_exp.adapters.layers.bitsandbytes import as_plain, dense_of
from lora_exp.adapters.layers.modules_to_save import SavedModule
from lora_exp.adapters.layers.trained_biases import CHILD, TrainedBiases, remove_biases
from lora_exp.adapters.numerics.packed_weights import is_quantised, moved_to
from lora_exp.adapters.routing.plan import Plan
from lora_exp.errors import UserError

Made = Callable[[], Tensor]  # a tensor that is computed when it is called


@dataclasses.dataclass
class MergeReport:
    """What storing W + delta in the weights' own dtype cost.

    max_error: the largest absolute rounding error of a weight; relative_error: ||error|| / ||delta|| over
    all layers, the share of the update that rounding lost. Both are 0 for float32 weights. survived: the share of
    delta that is in the stored weights, along delta itself; near 0 where 4 bits rounded a small update away
    (peft#2321), which relative_error alone does not tell from noise.
    """

    layers: int = 0
    max_error: float = 0.0
    relative_error: float = 0.0
    survived: float = 1.0


@dataclasses.dataclass(frozen=True)
class Merged:
    """A merge that holds: of which adapter, as it was asked for, and the plan that was live before."""

    name: str
    safe: bool
    requantise: bool
    before: Plan


@torch.inference_mode(False)  # what is made here is trained upon, or restored, outside of it
def merge(model: nn.Module, name: str, safe: bool, requantise: bool = False) -> MergeReport:
    """Fold adapter `name` into the weights of `model` in place; the base's own parameters are kept."""
    report, lost, wanted, found = MergeReport(), 0.0, 0.0, 0.0
    try:
        for layer_name, layer in lora_layers(model):
            if name in layer.adapters:
                exact, rounded = _fold(layer, layer_name, name, safe, requantise)
                error = exact - rounded.to(exact.dtype)
                delta = exact - layer.dense_weight().to(exact.dtype)
                report.layers += 1
                report.max_error = max(report.max_error, error.abs().max().item())
                lost += error.square().sum().item()
                wanted += delta.square().sum().item()
                found += ((delta - error) * delta).sum().item()
        _fold_biases(model, name)
    except BaseException:  # memory that ran out, or Ctrl-C: half a merge would be another model
        unmerge(model)
        raise
    report.relative_error = (lost / wanted) ** 0.5 if wanted else 0.0
    report.survived = found / wanted if wanted else 1.0
    return report


@torch.inference_mode(False)
def unmerge(model: nn.Module) -> None:
    """Put the base's own parameters back, bit for bit."""
    kept = [(module, weights_kept(module)) for _, module in base_modules(model) if weights_kept(module)]
    kept += [(owner, trained.kept) for _, owner, trained in biased_modules(model) if trained.kept]
    for module, parameters in kept:
        for key, parameter in parameters.items():
            now = getattr(module, key)
            if parameter.dtype != now.dtype and not is_quantised(parameter):
                raise UserError(
                    f"the model was cast from {parameter.dtype} to {now.dtype} with an adapter merged in, so "
                    "the base cannot be restored bit for bit; cast it back first, or load the base anew"
                )
    moved: dict[int, nn.Parameter] = {}  # once each, so that tied ones stay tied
    for module, parameters in kept:
        for key, parameter in parameters.items():
            device = getattr(module, key).device
            setattr(module, key, moved.setdefault(id(parameter), moved_to(parameter, device)))
        parameters.clear()


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base's own parameters in whose place merged ones are now, by their names in the state dict."""
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        trained = module._modules.get(CHILD)
        for kept in (weights_kept(module), trained.kept if isinstance(trained, TrainedBiases) else {}):
            found.update((joined(name, key), parameter) for key, parameter in kept.items())
    return found


def unload(model: nn.Module, name: str | None) -> nn.Module:
    """The model in its original classes, in place, with nothing of the library left.

    What is merged stays merged; the modules that adapter `name` saved replace the originals.
    """
    for module_name, switch in list(saved_modules(model)):
        parent = model.get_submodule(module_name.rpartition(".")[0])
        parent._modules[module_name.rpartition(".")[2]] = _plain_copy(switch, name)
    _share_biases(model)
    for _, owner, _ in list(biased_modules(model)):
        remove_biases(owner)
    layers = [layer for _, layer in lora_layers(model)]
    was_dequantised = any(
        is_quantised(own) and not is_quantised(getattr(module, key))
        for module in model.modules()
        for key, own in weights_kept(module).items()
    )
    for layer in layers:
        strip(layer)
    allow_fast_paths(model)
    if was_dequantised:
        dequantise(model)
    return model


def dequantise(model: nn.Module) -> None:
    """Turn what is left of a quantised base into plain layers, in the dtype that the model was loaded in."""
    dtype = getattr(getattr(model, "config", None), "dtype", None)
    for layer in [m for m in model.modules() if is_quantised(getattr(m, "weight", None))]:
        as_plain(layer, dtype)
    for parameter in model.parameters() if dtype is not None else ():
        parameter.data = parameter.data.to(dtype)  # norms and head may have been raised to float32 for training
    for key in ("quantization_config", "_pre_quantization_dtype"):
        getattr(getattr(model, "config", None), "__dict__", {}).pop(key, None)
    for key in ("hf_quantizer", "is_loaded_in_4bit", "is_loaded_in_8bit", "is_quantized", "quantization_method"):
        model.__dict__.pop(key, None)


@torch.inference_mode(False)
def merged_state(model: nn.Module, name: str) -> tuple[dict[str, Tensor], list[list[str]]]:
    """The state dict of the original class with adapter `name` merged in, and the ties that it undoes.

    `model` stays as it is, whatever is merged into it now.
    """
    state = {key: make() for key, make in merged_tensors(model, name, rounded=True).items()}
    return state, untied_groups(state, weight_ties(model))


def merged_tensors(model: nn.Module, name: str, rounded: bool = False) -> dict[str, Made]:
    """The same state dict, each of its tensors made when it is called, so that one at a time need be in memory.

    Merged weights come as they were summed, in the factors' dtype; `rounded`: in the weights' own.
    """
    trained = {id(own_parameter(o, "bias")): t.values[name] for _, o, t in biased_modules(model) if name in t.values}
    places = {(id(holder), key): layer for _, layer in lora_layers(model) for holder, key in [layer.place]}
    merged: dict[str, Made] = {}
    ours: list[str] = []  # how keys begin that the original class has not
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key in module._parameters:
            if (layer := places.get((id(module), key))) is not None and name in layer.adapters:
                merged[joined(prefix, key)] = partial(_merged_weight, layer, name, rounded)
            elif (own := own_parameter(module, key)) is not None and is_quantised(own):
                merged[joined(prefix, key)] = partial(dense_of, module, own)
            elif own is not None:
                merged[joined(prefix, key)] = partial(trained.get(id(own), own).detach().to, own.dtype)
        if is_quantised(own_parameter(module, "weight")) or isinstance(module, LoRALayerBase):
            ours += [joined(prefix, key) for key in ("weight.", "SCB", "weight_format", "adapters.")]
        ours += [joined(prefix, f"{CHILD}.")] if CHILD in module._modules else []
    state = {**{key: partial(_same, value) for key, value in model.state_dict().items()}, **merged}
    return _with_saved({key: make for key, make in state.items() if not key.startswith(tuple(ours))}, model, name)


def _same(tensor: Tensor) -> Tensor:
    return tensor


@torch.inference_mode(False)
@torch.no_grad()
def _merged_weight(layer: LoRALayerBase, name: str, rounded: bool) -> Tensor:
    """A layer's dense weight with its adapter `name`."""
    exact = layer.adapter_named(name).merged(layer)
    return exact.to(layer.merged_dtype) if rounded else exact


@torch.no_grad()
def _fold(layer: LoRALayerBase, layer_name: str, name: str, safe: bool, requantise: bool) -> tuple[Tensor, Tensor]:
    """(W + delta in float32, what is stored of it)"""
    exact = layer.adapter_named(name).merged(layer)
    rounded = exact.to(layer.merged_dtype)
    if safe and not torch.isfinite(rounded).all():
        raise UserError(
            f"merging {name!r} makes weights of {layer_name} that are not finite; nothing was merged. "
            "Check the adapter for a diverged run"
        )
    # A new parameter: one that is tied elsewhere (embedding = lm_head) must not change there.
    holder, key = layer.place
    own = weights_kept(holder)[key] = getattr(holder, key)
    if requantise:
        setattr(holder, key, layer.requantised(rounded, own))
        return exact, dense_of(layer, layer.weight)
    setattr(holder, key, nn.Parameter(rounded, requires_grad=False))
    return exact, rounded


def _fold_biases(model: nn.Module, name: str) -> None:
    made: dict[int, nn.Parameter] = {}  # a bias that modules share stays shared
    for _, owner, trained in biased_modules(model):
        if name in trained.values:
            base = cast(nn.Parameter, owner.bias)
            trained.kept["bias"] = base
            if id(base) not in made:
                made[id(base)] = nn.Parameter(trained.values[name].detach().to(base.dtype), requires_grad=False)
            owner.bias = made[id(base)]


def _share_biases(model: nn.Module) -> None:
    """Give a merged bias to the modules as well that hold the same one without training it (BERT's head)."""
    merged = {id(t.kept["bias"]): owner.bias for _, owner, t in biased_modules(model) if t.kept}
    for _, module in base_modules(model) if merged else ():
        if (bias := merged.get(id(module._parameters.get("bias")))) is not None:
            module.bias = bias


def _plain_copy(switch: SavedModule, name: str | None) -> nn.Module:
    if name is None or name not in switch.copies:
        return switch.original
    for key, trained in switch.copies[name].named_parameters():
        trained.data = trained.data.to(switch.original.get_parameter(key).dtype)
        trained.requires_grad_(False)
    return switch.copies[name]


def _with_saved(state: dict[str, Made], model: nn.Module, name: str) -> dict[str, Made]:
    """`state` with the entries of switches renamed to those of the modules that they stand for."""
    for module_name, switch in saved_modules(model):
        outer, inner = f"{module_name}.", f"{module_name}.original."
        mine = {key: state.pop(key) for key in list(state) if key.startswith(outer)}
        plain = {key.removeprefix(inner): value for key, value in mine.items() if key.startswith(inner)}
        if name in switch.copies:
            trained = switch.copies[name].state_dict()
            plain = {key: partial(trained[key].to, make().dtype) for key, make in plain.items()}
        state.update({outer + key: value for key, value in plain.items()})
    return state
