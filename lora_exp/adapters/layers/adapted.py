"""What every adapted layer shares: its adapters, and how a call finds the right one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_exp.adapters.kernels.linear import fused_output
from lora_exp.adapters.layers.registry import base_class_of, forward_override, restore
from lora_exp.adapters.layers.unloading import merged_copy
from lora_exp.adapters.routing.route import BASE, Plan, Route
from lora_exp.adapters.variants.lora import LoraAdapter

DEFAULT = "default"


class LoRALayerBase(nn.Module):
    """Mixed into a torch layer in front of it: `class LoRALinear(LoRALayerBase, nn.Linear)`.

    The base layer's parameters keep their names; adapters live in `adapters`, by name. A kind of layer
    states its geometry in the methods below `# Geometry`; a quantised one overrides `base_forward`,
    `linear_forward` and `dense_weight`.
    """

    layer_type: ClassVar[str]
    made_from: ClassVar[tuple[type[LoRALayerBase], type[nn.Module]] | None] = None
    out_axis: ClassVar[int] = 0  # the weight's dimension that counts output features
    fuses: ClassVar[bool] = False  # whether its gradients are written by hand, in `fused_path`
    fused_path: ClassVar[Callable[..., Tensor | None]] = staticmethod(fused_output)  # a linear layer's

    own_attributes: ClassVar[tuple[str, ...]] = ("route", "kept")  # what the base class has not

    compute_dtype: torch.dtype | None = None  # of the base's product; x's own if None
    weight: Any  # the torch layer's own parameters
    bias: Any
    adapters: nn.ModuleDict
    route: Route
    kept: dict[str, nn.Parameter]  # the base's own parameters while an adapter is merged in

    # Geometry

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        raise NotImplementedError

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Fill zeroed factors in place from the global RNG, one of them staying zero."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B(A(x)), computed in x's dtype so that no float32 copy of a bf16 activation is made."""
        raise NotImplementedError

    def linear_forward(self, x: Tensor) -> Tensor:
        """The base layer's output for x without its bias."""
        raise NotImplementedError

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """AB in the weight's shape."""
        raise NotImplementedError

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """W (out, K), A (K, r), B (r, out) with delta = (AB)ᵀ; None where the delta is no single product."""
        return None

    def along_output(self, values: Tensor) -> Tensor:
        """(out,) -> a shape that broadcasts over the layer's output."""
        return values

    def along_weight(self, values: Tensor) -> Tensor:
        """(out,) -> a shape that broadcasts over the weight."""
        return values.view([-1 if axis == self.out_axis else 1 for axis in range(self.dense_weight().dim())])

    # Hooks for a base that is not a plain float weight

    def base_forward(self, x: Tensor) -> Tensor:
        return super().forward(x)  # the torch layer behind this mixin

    def dense_weight(self) -> Tensor:
        """The base weight in floating point, in its own shape, whatever is merged into it now."""
        return self.kept.get("weight", self.weight)

    @property
    def merged_dtype(self) -> torch.dtype:
        """What merged weights are stored in; at least 16 bits."""
        return self.dense_weight().dtype

    def requantised(self, dense: Tensor, like: Any) -> nn.Parameter:
        """`dense` stored as the quantised weight `like` is."""
        raise ValueError("the base is not quantised, so there is nothing to requantise; merge without it")

    def plain_class(self) -> type[nn.Module]:
        """The class that the layer goes back to."""
        return base_class_of(self)

    def finish(self, out: Tensor) -> Tensor:
        """What the base layer does after its weight was applied (an embedding's max_norm)."""
        return out

    @property
    def factor_dtype(self) -> torch.dtype:
        """float32 on any base, float64 on a float64 one."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32

    # Calls

    def forward(self, input: Tensor) -> Tensor:
        plan = self.route.plan()
        if not plan.names or self.is_merged:
            return self.finish(self.base_forward(input))
        if self.fuses and (fused := self.fused_path(self, input, plan)) is not None:
            return self.finish(fused)
        if plan.sizes is not None:
            return self.finish(self._routed(input, plan))
        adapter = self._adapter(plan.names[0])
        out = self.base_forward(input) if adapter is None else adapter.output(self, input)
        return self.finish(out)

    def _routed(self, x: Tensor, plan: Plan) -> Tensor:
        """One base product for all, then each slice through its own adapter."""
        assert plan.sizes is not None
        if x.shape[0] == 1 < sum(plan.sizes):  # one input for all samples, such as position ids
            x = x.expand(sum(plan.sizes), *x.shape[1:])
        base, parts = self.base_forward(x), []
        for name, start, stop in plan.split(x.shape[0]):
            adapter, part = self._adapter(name), base[start:stop]
            parts.append(part if adapter is None else adapter.add_to(self, x[start:stop], part))
        return torch.cat(parts)

    def _adapter(self, name: str) -> LoraAdapter | None:
        return self.adapters._modules.get(name)  # type: ignore[return-value]

    def __reduce_ex__(self, protocol: Any) -> Any:
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
        return None

    @classmethod
    def largest_rank(cls, module: nn.Module) -> int:
        """The larger side of the weight as a matrix; no rank above it has a meaning."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        outputs = weight.shape[cls.out_axis]
        return max(outputs, weight.numel() // outputs)

    def adopt(self, route: Route) -> None:
        """Turn a base layer whose class has just become this one into an adapted layer without adapters."""
        self.adapters = nn.ModuleDict()
        self.route = route
        self.kept = {}
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad_(False)

    def add_adapter(self, adapter: LoraAdapter) -> None:
        adapter.prepare(self)
        adapter.train(self.training)
        self.adapters[adapter.name] = adapter

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
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

    def merge(self) -> Any:
        """A new layer of the original class with W + delta_weight; this one stays as it is."""
        return merged_copy(self)

    def delta_weight(self, name: str | None = None) -> Tensor:
        """scale * AB in the weight's shape, for the named or the active adapter."""
        adapter: Any = self.adapter if name is None else self.adapters[name]
        return adapter.delta_weight(self)
