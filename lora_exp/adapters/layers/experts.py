"""Adapted experts of a mixture, as transformers 5 stacks them in 3-D parameters (Mixtral, Qwen3-MoE, gpt-oss, ...).

Known by what transformers' `use_experts_implementation` leaves on a module; transformers itself is never imported.

Letters: T tokens, k experts a token, S = T k rows (pairs of a token and one of its experts, sorted by expert),
E experts, in / out a matrix's sides, r rank.
"""

from __future__ import annotations

import math
from typing import ClassVar, Protocol, SupportsIndex, cast

import torch
from torch import Tensor, nn

from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.experts import Groups, way_for
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.layers.registry import PARTS, adapted_class, adapts, divides, rebind, restore
from lora_exp.adapters.numerics.typed_torch import not_compiled
from lora_exp.adapters.routing.plan import Plan
from lora_exp.adapters.routing.route import Route
from lora_exp.errors import UserError

_MULTIPLIED = ("gate_up_proj", "up_proj", "down_proj")  # what transformers' own implementations multiply with
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel", "num_experts")
_Served = list[tuple[str, Tensor | None]]  # (adapter, the rows that it serves; None: all)


class ExpertWeight(nn.Module):
    """One stack of weights, (E, out, in) or (E, in, out), as a layer of its own. The parameter stays its owner's."""

    def __init__(self, owner: nn.Module, key: str) -> None:
        super().__init__()
        self.held = (owner, key)  # in a tuple, so that the owner is no child of its part
        self.training = owner.training

    @property
    def weight(self) -> Tensor:
        owner, key = self.held
        stack: Tensor = getattr(owner, key)
        return stack


@divides
def expert_weights(module: nn.Module) -> dict[str, nn.Module]:
    """The stacks of a module of experts, in the order of its parameters."""
    if not type(module).__name__.endswith("Experts"):
        return {}
    parts = module._modules.get(PARTS)
    adapted = {} if parts is None else dict(parts.named_children())
    stacks = [key for key, value in module._parameters.items() if value is not None and value.dim() == 3]
    return {key: adapted.get(key) or ExpertWeight(module, key) for key in stacks}


@adapts(f"{__name__}.ExpertWeight")
class LoRAExpertWeight(LoRALayerBase, ExpertWeight):
    """y = x W[e] + b[e] + scale * (drop(x) A[e]) B[e] for a row x (in,) of expert e.

    A (E, in, r), B (E, r, out): rank r for each expert, as in PEFT's `target_parameters`. Dropout is drawn anew for
    each pair of token and expert, as it would be if each expert were a layer of its own.
    """

    layer_type = "experts"
    is_stack = True
    own_attributes = ("route",)

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        assert isinstance(module, ExpertWeight)
        owner, key = module.held
        if isinstance(owner, LoRAExperts):
            return None
        known = all(hasattr(owner, flag) for flag in _FLAGS) and hasattr(type(owner).forward, "__wrapped__")
        if not known or key not in _MULTIPLIED:
            return f"{type(owner).__name__} computes its experts by itself, not by transformers' experts interface"
        if not getattr(owner, key).is_floating_point():
            return "its experts are stored quantised"
        return "its experts are shared out among processes" if owner._is_expert_parallel else None

    @classmethod
    def largest_rank(cls, module: nn.Module) -> int:
        assert isinstance(module, ExpertWeight)
        return max(module.weight.shape[1:])

    def adopt(self, route: Route) -> None:
        self.adapters, self.route = nn.ModuleDict(), route
        owner, key = self.held
        if not isinstance(owner, LoRAExperts):
            owner.__class__ = adapted_class(LoRAExperts, type(owner))
            self.owner.adopt(route)
        self.owner.parts[key] = self

    def leave(self) -> None:
        parts = self.owner.parts
        del parts[self.held[1]]
        if not len(parts):
            self.owner.retire()

    def merge(self) -> nn.Module:
        raise UserError("a stack of expert weights is no layer that could stand alone; merge the model that it is in")

    # Geometry

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        experts, inputs, outputs = self.stacked.shape
        return (experts, inputs, rank), (experts, rank, outputs)

    def empty_factors(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """In memory (E, r, in) and (r, E, out), which are PEFT's (E r, in) and, transposed, (out, r E)."""
        experts, inputs, outputs = self.stacked.shape
        lora_A = torch.zeros(experts, rank, inputs, dtype=dtype, device=device)
        lora_B = torch.zeros(rank, experts, outputs, dtype=dtype, device=device)
        return lora_A.mT, lora_B.transpose(0, 1)

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        nn.init.kaiming_uniform_(lora_A.mT.flatten(0, 1), a=math.sqrt(5))  # a view: each row is of one expert

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        delta = lora_A @ lora_B
        return delta if self._is_transposed else delta.mT

    def peft_factors(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """(E r, in), (out, r E)"""
        flat_A = lora_A.mT.view(-1, lora_A.shape[1])
        return {"lora_A.weight": flat_A, "lora_B.weight": lora_B.transpose(0, 1).view(-1, lora_B.shape[2]).T}

    @property
    def stacked(self) -> Tensor:
        """(E, in, out)"""
        weight: Tensor = self.weight
        return weight if self._is_transposed else weight.mT

    @property
    def _is_transposed(self) -> bool:
        return bool(self.held[0].is_transposed)

    # The base

    @property
    def owner(self) -> LoRAExperts:
        """The module whose parameter it is, once that is adapted."""
        return cast(LoRAExperts, self.held[0])

    @property
    def place(self) -> tuple[nn.Module, str]:
        return self.held

    @property
    def is_merged(self) -> bool:
        return self.held[1] in self.owner.kept

    def dense_weight(self) -> Tensor:
        return self.owner.kept.get(self.held[1], self.weight)

    # Calls

    def serves(self, plan: Plan) -> bool:
        return not self.is_merged and any(name in self.adapters for name in plan.names)

    def add_to(self, x: Tensor, base: Tensor, groups: Groups, served: _Served) -> Tensor:
        """base (S, out) with what the adapters add for x (S, in)."""
        for name, rows in served:
            if (adapter := self._adapter(name)) is None:
                continue
            host = cast(Host, _InCall(self, groups.at(rows)))
            if rows is None:
                return adapter.add_to(host, x, base)
            base = base.index_copy(0, rows, adapter.add_to(host, x[rows], base[rows]))
        return base


class _InCall:
    """A stack as a variant sees it during one call: which rows are whose is the call's, all else the host's."""

    def __init__(self, host: LoRAExpertWeight, groups: Groups) -> None:
        self._host, self._groups = host, groups

    def __getattr__(self, name: str) -> object:
        value: object = getattr(self._host, name)
        return value

    def linear_forward(self, x: Tensor) -> Tensor:
        return self._groups.product(x.to(self._host.weight.dtype), self._host.stacked)

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        inner = self._groups.product(x, lora_A.to(x.dtype))
        return self._groups.product(inner, lora_B.to(inner.dtype))


class _Mixture(Protocol):
    """A module of experts, as transformers' `use_experts_implementation` leaves it."""

    config: object
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool
    is_transposed: bool

    def _apply_gate(self, inner: Tensor) -> Tensor: ...

    def act_fn(self, inner: Tensor) -> Tensor: ...

    def post_expert_norm(self, out: Tensor) -> Tensor: ...


class LoRAExperts(nn.Module):
    """Mixed into a module of experts in front of it. Without an adapter to serve, the module's own forward runs.

    With one, the same is computed by our own products, in the way that the model's experts implementation names.
    """

    made_from: ClassVar[tuple[type[LoRAExperts], type[nn.Module]]]
    route: Route
    kept: dict[str, nn.Parameter]

    @property
    def parts(self) -> nn.ModuleDict:
        return cast(nn.ModuleDict, self._modules[PARTS])

    def adopt(self, route: Route) -> None:
        self.route, self.kept = route, {}
        self.add_module(PARTS, nn.ModuleDict())
        rebind(self)

    def retire(self) -> None:
        """Back to the class that it had."""
        del self._modules[PARTS], self.route, self.kept
        self.__class__ = self.made_from[1]  # type: ignore[assignment]
        rebind(self)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        plan = self.route.plan()
        if not any(cast(LoRAExpertWeight, part).serves(plan) for part in self.parts.values()):
            out: Tensor = super().forward(*args, **kwargs)
            return out
        return self._adapted(plan, *args, *kwargs.values())

    @not_compiled  # how many rows each expert has follows from values
    def _adapted(self, plan: Plan, hidden: Tensor, chosen: Tensor, shares: Tensor) -> Tensor:
        """hidden (T, in), the experts chosen (T, k), their shares of a token (T, k) -> (T, in)"""
        me = cast(_Mixture, self)
        ids, order = chosen.reshape(-1).sort(stable=True)  # stable: a sample's rows have one order in any batch
        way = way_for(getattr(me.config, "_experts_implementation", None))
        tokens, groups = order // chosen.shape[1], Groups(ids, me.num_experts, way)
        served = _served(plan, len(hidden), tokens)
        inner = self._multiplied("gate_up_proj" if me.has_gate else "up_proj", plan, hidden[tokens], groups, served)
        inner = me._apply_gate(inner) if me.has_gate else me.act_fn(inner)
        out = self._multiplied("down_proj", plan, inner, groups, served)
        if me.has_post_expert_norm:
            out = me.post_expert_norm(out)
        out = out * shares.reshape(-1)[order].unsqueeze(-1)
        return out[order.argsort()].view(*chosen.shape, -1).sum(1).to(hidden.dtype)

    def _multiplied(self, key: str, plan: Plan, x: Tensor, groups: Groups, served: _Served) -> Tensor:
        """(S, in) -> (S, out)"""
        me = cast(_Mixture, self)
        weight: Tensor = getattr(self, key)
        out = groups.product(x.to(weight.dtype), weight if me.is_transposed else weight.mT)
        if me.has_bias:
            out = out + getattr(self, f"{key}_bias")[groups.ids]
        part = cast("LoRAExpertWeight | None", self.parts._modules.get(key))
        return out if part is None or not part.serves(plan) else part.add_to(x, out, groups, served)

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[object, ...]:
        return restore, self.made_from, self.__dict__


def _served(plan: Plan, length: int, tokens: Tensor) -> _Served:
    """Whom the rows go to: those of each slice of the batch, wherever the sorting has put them."""
    if plan.sizes is None:
        return [(plan.names[0], None)]
    spans = plan.split(length)
    return [(name, ((tokens >= first) & (tokens < end)).nonzero().flatten()) for name, first, end in spans]
