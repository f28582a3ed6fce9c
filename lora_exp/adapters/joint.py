"""Adapters of several models over the same frozen weights, in one batch."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager

from torch import nn

from lora_exp.adapters.inspection import base_hash
from lora_exp.adapters.inspection.traversal import base_modules, biased_modules, lora_layers, saved_modules
from lora_exp.adapters.model import LoraModel
from lora_exp.adapters.numerics.packed_weights import keep_trainable
from lora_exp.adapters.routing.plan import sliced_plan
from lora_exp.adapters.routing.route import Route
from lora_exp.adapters.signature import class_like
from lora_exp.adapters.surgery.injection import adopted
from lora_exp.errors import UserError


class JointModel(LoraModel):
    """A model without an adapter of its own: it is lent those of other LoraModels, by new names.

    `model` has the same weights as theirs, in modules of its own (`lora_exp.models.twin`). What is trained here is
    trained there: a lent adapter has the very parameters, and its dropout follows from the same seed and count. A part
    of the batch may go to a name that nobody has: it sees the base alone.

    `is_batched`: in linear layers, slices of one size go through their plain LoRA by one batched product for all. Then
    the last bits of a lane depend on the others' number and largest rank.
    """

    def __init__(self, model: nn.Module, is_batched: bool = False) -> None:
        nn.Module.__init__(self)
        self.configs = {}
        self.wrapped = model
        self.__class__ = class_like(type(self), model)
        self.route_state = Route()
        self.route_state.batches_lanes = is_batched
        self.known_base = base_hash.Known()
        self._merged = None
        keep_trainable(model)
        model.requires_grad_(False)

    def borrow(self, name: str, other: LoraModel) -> None:
        """Take in `other`'s active adapter as `name`. Raises UserError for one that is more than factors in layers."""
        if reason := why_alone(other):
            raise UserError(f"adapter {name!r} cannot share a batch: {reason}")
        self._check_new_name(name)
        theirs = other._chosen(None)
        modules = dict(base_modules(self.wrapped))
        for layer_name, layer in lora_layers(other.wrapped):
            lent = copy.copy(layer.adapter_named(theirs))  # the same parameters under another name
            lent.name = name
            adopted(modules[layer_name], self.route_state).adapters[name] = lent
        self.configs[name] = other.configs[theirs]
        self.route_state.clocks[name] = other.route_state.clocks[theirs]

    def give_back(self, name: str) -> None:
        """The adapter `name` is not here any more; there it is what it has become."""
        self.delete_adapter(name)

    def passing(self, sizes: Mapping[str, int]) -> AbstractContextManager[None]:
        """`route`, in which a name that nobody has means the base alone."""
        return self.route_state.using(sliced_plan(sizes))


def why_alone(model: LoraModel) -> str | None:
    """Why a model's adapter cannot be lent; None if it can."""
    wrapped = model.wrapped
    if next(saved_modules(wrapped), None) is not None:
        return "it trains modules in full"
    if next(biased_modules(wrapped), None) is not None:
        return "it trains biases"
    if any(layer.is_stack for _, layer in lora_layers(wrapped)):
        return "it has experts that are stacked in one weight"
    if model.merged_adapter is not None:
        return "it is merged"
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in wrapped.modules()):
        return "rows see each other in the model's batch norms"
    return None
