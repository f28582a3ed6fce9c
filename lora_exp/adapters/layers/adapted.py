"""What every adapted layer shares: its adapters, and how a call finds the right one."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from typing import ClassVar, SupportsIndex, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.linear import Served, fused_linear
from lora_exp.adapters.kernels.terms import Terms
from lora_exp.adapters.layers.registry import base_class_of, forward_override, rebind, restore
from lora_exp.adapters.layers.trained_biases import CHILD, TrainedBiases, remove_biases
from lora_exp.adapters.numerics.reference import fused_allowed, is_plain
from lora_exp.adapters.routing.plan import BASE, Plan
from lora_exp.adapters.routing.route import Route
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.errors import UserError

DEFAULT = "default"


class LoRALayerBase(Host):
    """Mixed into a torch layer in front of it: `class LoRALinear(LoRALayerBase, nn.Linear)`.

    The base layer's parameters keep their names; adapters live in `adapters`, by name. A kind of layer states its
    geometry as `Host` asks for it.
    """

    fuses: ClassVar[bool] = False  # whether its gradients are written by hand, in `kernel`
    first_variant: ClassVar[type[LoraAdapter]] = LoraAdapter  # of a layer that a user makes by hand
    own_attributes: ClassVar[tuple[str, ...]] = ("route", "kept")  # what the base class has not
    adapters: nn.ModuleDict

    def plain_class(self) -> type[nn.Module]:
        """The class that the layer goes back to."""
        return base_class_of(self)

    # Calls

    def forward(self, input: Tensor) -> Tensor:
        plan = self.route.plan()
        if not plan.names or self.is_merged:
            return self.finish(self.base_forward(input))
        x, spans = plan.read(input)
        return self.finish(self._adapted(x, [(self._adapter(name), rows) for name, rows in spans]))

    def _adapted(self, x: Tensor, served: Sequence[tuple[LoraAdapter | None, slice | None]]) -> Tensor:
        if all(adapter is None for adapter, _ in served):
            return self.base_forward(x)
        terms = self._terms(x, served)
        if terms is not None and (fused := self.kernel(x, terms)) is not None:
            return fused
        first = served[0][0]
        if len(served) == 1 and first is not None:
            return first.output(self, x)
        base = self.base_forward(x)  # one base product for all, then each slice through its own adapter
        parts = [(adapter, x[rows], base[rows]) for adapter, rows in served]
        return torch.cat([part if adapter is None else adapter.add_to(self, x, part) for adapter, x, part in parts])

    def _terms(self, x: Tensor, served: Sequence[tuple[LoraAdapter | None, slice | None]]) -> Served | None:
        """What the kernel runs the adapters by; None where only the plain formulas will do."""
        if not (self.fuses and fused_allowed() and is_plain(x)) or self._trains_base():
            return None
        found: list[tuple[Terms | None, slice | None]] = []
        for adapter, rows in served:
            terms = None if adapter is None else adapter.kernel_terms(self)
            if terms is None and adapter is not None:
                return None
            found.append((terms, rows))
        return found

    def kernel(self, x: Tensor, terms: Served) -> Tensor | None:
        """The output by a hand-written kernel, if this kind `fuses`; None where it cannot. A linear layer's."""
        return fused_linear(self, x, terms)

    def _trains_base(self) -> bool:
        return any(parameter is not None and parameter.requires_grad for parameter in self._parameters.values())

    def _adapter(self, name: str) -> LoraAdapter | None:
        return self.adapters._modules.get(name)  # type: ignore[return-value]

    def adapter_named(self, name: str) -> LoraAdapter:
        return cast(LoraAdapter, self.adapters[name])

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[object, ...]:
        if self.made_from is None:
            return super().__reduce_ex__(protocol)
        return restore, self.made_from, self.__dict__

    # Adapters

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        """Why this kind of layer cannot adapt `module` at `rank`; None if it can."""
        weight = module._parameters.get("weight")
        if weight is None or isinstance(weight, nn.UninitializedParameter):
            return "its weight is computed (a parametrisation) or not there yet, so nothing could be merged"
        if (owner := forward_override(module)) is not None:
            return f"{owner.__name__} has a forward of its own, which an adapter could not follow"
        return cls.rank_refusal(module, rank)

    @classmethod
    def rank_refusal(cls, module: nn.Module, rank: int) -> str | None:
        """Why no adapter of this rank fits, whatever the weight holds; None if one does."""
        return None

    def adopt(self, route: Route) -> None:
        """Turn a base layer whose class has just become this one into an adapted layer without adapters."""
        self.adapters = nn.ModuleDict()
        self.route = route
        self.kept = {}
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)

    def begin(self, rank: int, alpha: float, dropout: float, use_rslora: bool) -> None:
        """The end of every constructor: a layer on its own, outside any model, holds one adapter. Raises UserError."""
        self.adopt(Route(Plan((DEFAULT,))))
        if reason := self.rank_refusal(self, rank):
            raise UserError(reason)
        self.add_adapter(self.first_variant(DEFAULT, rank, alpha, dropout, use_rslora))

    def leave(self) -> None:
        """Undo what `adopt` did outside of the layer."""

    def add_adapter(self, adapter: LoraAdapter) -> None:
        adapter.prepare(self)
        adapter.train(self.training)
        self.adapters[adapter.name] = adapter

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict:
            for adapter in self.adapters.values():
                adapter.base_loaded(self)  # type: ignore[operator]

    @property
    def is_merged(self) -> bool:
        return len(self.kept) > 0  # torch.compile does not guard bool() of a dict: it would not see a merge

    @property
    def adapter(self) -> LoraAdapter:
        """The active adapter of this layer; the only one if none is active."""
        for name in self.route.live.names:
            if name != BASE and name in self.adapters:
                return self.adapters[name]  # type: ignore[return-value]
        return next(iter(self.adapters.values()))  # type: ignore[return-value]

    @property
    def lora_A(self) -> nn.Parameter:
        return self.adapter.lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        return self.adapter.lora_B

    @property
    def rank(self) -> int:
        return self.adapter.rank

    @property
    def alpha(self) -> float:
        return self.adapter.alpha

    @property
    def scale(self) -> float:
        return self.adapter.scale

    @property
    def lora_dropout(self) -> float:
        return self.adapter.dropout

    def merge(self) -> nn.Module:
        """A new layer of the original class with W + delta_weight; this one stays as it is."""
        return merged_copy(self)

    def delta_weight(self, name: str | None = None) -> Tensor:
        """scale * AB in the weight's shape, for the named or the active adapter."""
        adapter = self.adapter if name is None else self.adapter_named(name)
        return adapter.delta_weight(self)


def strip(layer: LoRALayerBase) -> nn.Module:
    """The layer itself, back in the class it had before it was adapted."""
    layer.leave()
    plain: nn.Module = layer
    original = layer.plain_class()
    del layer.adapters
    for key in layer.own_attributes:
        layer.__dict__.pop(key, None)
    plain.__class__ = original
    rebind(plain)
    return plain


def allow_fast_paths(model: nn.Module) -> None:
    """Undo what keeps torch's encoder from reading the weights of adapted layers without calling them."""
    encoders = [module for module in model.modules() if isinstance(module, nn.TransformerEncoder)]
    for layer in model.modules():
        if isinstance(layer, nn.TransformerEncoderLayer):
            act = layer.activation
            layer.activation_relu_or_gelu = (
                1
                if act is F.relu or isinstance(act, nn.ReLU)
                else 2
                if act is F.gelu or isinstance(act, nn.GELU)
                else 0
            )
    for encoder in encoders:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch says why a layer has no fast path
            like = nn.TransformerEncoder(encoder.layers[0], 0, None, encoder.enable_nested_tensor)
        encoder.use_nested_tensor = like.use_nested_tensor


def merged_copy(layer: LoRALayerBase) -> nn.Module:
    """A plain layer of the original class with the active adapter merged in; `layer` stays as it is."""
    twin = copy.copy(layer)
    twin.__dict__ = {key: dict(value) if isinstance(value, dict) else value for key, value in vars(layer).items()}
    weight = layer.adapter.merged(layer).detach().to(layer.merged_dtype)
    trained = twin._modules.get(CHILD)
    if trained is not None:
        remove_biases(twin)
    twin.weight = nn.Parameter(weight)  # first: a quantised layer goes back to another class with a dense weight
    strip(twin)
    if isinstance(bias := getattr(twin, "bias", None), nn.Parameter):
        name = layer.adapter.name
        own = trained.values[name] if isinstance(trained, TrainedBiases) and name in trained.values else bias
        twin.bias = nn.Parameter(own.detach().to(bias.dtype, copy=True))
    return twin
