"""Adapted linear layers of bitsandbytes: QLoRA and QDoRA (arXiv 2305.14314) on 4-bit and 8-bit bases.

Known by name, so that bitsandbytes is imported only by who builds such a layer or brings one.

Letters: out / in the layer's features, ... any leading dimensions.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import strip
from lora_exp.adapters.layers.linear import LoRALinear
from lora_exp.adapters.layers.registry import adapted_class, adapts
from lora_exp.adapters.numerics.packed_weights import (
    bring_constants,
    constants,
    functional,
    is_quantised,
    keep_trainable,
    recover_class,
)
from lora_exp.adapters.routing.plan import Plan
from lora_exp.adapters.routing.route import Route

_MODULES = "bitsandbytes.nn.modules"


class _Quantised(LoRALinear):
    """h = x dq(W)ᵀ + b + scale * (drop(x) A) B, x (..., in), h (..., out), W stored in 4 or 8 bits.

    W is dequantised once a forward pass for all that need it (the product, DoRA's norms, a dropped input's
    product) and again in the backward pass, so that no dense copy is kept between the two. Each time into a
    tensor of its own: bitsandbytes' CPU kernels take no buffer, and CUDA's allocator hands the last one out again.
    Products are in `compute_dtype` where it is set, else in x's own dtype. Activations stay as they are:
    bitsandbytes' int8 kernel would round them, which training would see as noise.
    """

    base_name = ""
    own_attributes = (*LoRALinear.own_attributes, "_shared")
    _shared: Callable[[], Tensor] | None = None  # dq(W) of the forward pass that is running

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls.made_from is not None:
            return super().__new__(cls)
        base = getattr(importlib.import_module(_MODULES), cls.base_name)
        return super().__new__(adapted_class(cls, base))

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        rank: int = 8,
        lora_alpha: float = 8.0,
        lora_dropout: float = 0.0,
        use_rslora: bool = True,
        **quantisation: Any,
    ) -> None:
        """`quantisation` goes to the bitsandbytes layer; as there, `.to(device)` is what quantises."""
        assert self.made_from is not None
        self.made_from[1].__init__(self, in_features, out_features, bias, **quantisation)
        self.begin(rank, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        weight: Any = module.weight
        if not (weight.is_meta or is_quantised(weight)):
            return "its weight is not quantised yet; move the model with .to(device) first, which quantises it"
        return super().refusal(module, rank)

    @classmethod
    def largest_rank(cls, module: Any) -> int:
        return int(max(module.in_features, module.out_features))

    # The dense weight

    def dequantise(self, weight: Any) -> Tensor:
        """(out, in) in floating point, of a weight of this layer."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        shared = self._shared
        return shared() if shared is not None else self._dense(self.kept.get("weight", self.weight))

    @property
    def merged_dtype(self) -> torch.dtype:
        state = getattr(self.kept.get("weight", self.weight), "quant_state", None)
        return state.dtype if state is not None else self.compute_dtype or torch.float32

    def plain_class(self) -> type[nn.Module]:
        if is_quantised(self.weight):
            return super().plain_class()
        drop_quantisation(self)
        return nn.Linear

    def along_weight(self, values: Tensor) -> Tensor:
        return values.view(-1, 1)

    def _dense(self, weight: Any) -> Tensor:
        with torch.no_grad():
            return self.dequantise(weight) if is_quantised(weight) else weight.detach()

    # Calls

    def forward(self, input: Tensor) -> Tensor:
        self._shared = _Once(lambda weight=self.weight: self._dense(weight))  # type: ignore[misc]
        try:
            return super().forward(input)
        finally:
            self._shared = None

    def base_forward(self, x: Tensor) -> Tensor:
        out = self.linear_forward(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def linear_forward(self, x: Tensor) -> Tensor:
        dtype, weight = self.compute_dtype or x.dtype, self.weight
        dense = self._shared() if self._shared is not None else self._dense(weight)
        return _Product.apply(x.to(dtype), dense.to(dtype), lambda: self._dense(weight)).to(x.dtype)

    # Storage

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for weight in (self.weight, self.kept.get("weight")):
            recover_class(weight)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        was_quantised = is_quantised(self.weight)
        super()._apply(fn, recurse)
        bring_constants(self.weight)
        if is_quantised(self.weight) and not was_quantised:
            for adapter in self.adapters.values():
                adapter.base_loaded(self)  # type: ignore[operator]
        return self


class _Product(torch.autograd.Function):
    """x Wᵀ for a frozen W that backward makes again instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dense: Tensor, again: Callable[[], Tensor]) -> Tensor:
        ctx.again = again
        return F.linear(x, dense)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,) = grads
        return (grad @ ctx.again().to(grad.dtype) if ctx.needs_input_grad[0] else None), None, None


class _Once:
    """A function's value, made at the first call."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self.make = make
        self.value: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.value is None:
            self.value = self.make()
        return self.value


@adapts(f"{_MODULES}.Linear4bit")
class LoRALinear4bit(_Quantised):
    __doc__ = _Quantised.__doc__
    base_name = "Linear4bit"

    def adopt(self, route: Route) -> None:
        super().adopt(route)
        keep_trainable(self)

    def dequantise(self, weight: Any) -> Tensor:
        state = copy.copy(weight.quant_state)
        # A product in float32 takes the values as they are, not rounded to the dtype that was quantised.
        state.dtype = torch.promote_types(state.dtype, self.compute_dtype or torch.float32)
        if state.shape[-1] % state.blocksize:  # bitsandbytes 0.50 misreads blocks across rows on a CPU
            state.shape = torch.Size((1, state.shape.numel()))
        return functional().dequantize_4bit(weight.data, state).view(weight.quant_state.shape)

    def requantised(self, dense: Tensor, like: Any) -> nn.Parameter:
        made = type(like)(
            dense.detach().to(like.quant_state.dtype).cpu(),
            requires_grad=False,
            blocksize=like.quant_state.blocksize,
            compress_statistics=like.quant_state.nested,
            quant_type=like.quant_state.quant_type,
            quant_storage=like.quant_storage,
        )
        return made.to(like.device)


@adapts(f"{_MODULES}.Linear8bitLt")
class LoRALinear8bit(_Quantised):
    __doc__ = _Quantised.__doc__
    base_name = "Linear8bitLt"

    def __init__(self, *args: Any, has_fp16_weights: bool = False, **options: Any) -> None:
        super().__init__(*args, has_fp16_weights=has_fp16_weights, **options)

    @classmethod
    def refusal(cls, module: Any, rank: int) -> str | None:
        if module.state.has_fp16_weights:
            return "has_fp16_weights=True keeps its weight in 16 bits; build it with has_fp16_weights=False"
        return super().refusal(module, rank)

    def adopt(self, route: Route) -> None:
        super().adopt(route)
        state: Any = self.state
        if state.SCB is not None:  # bitsandbytes' first call moved the constants; a weight that is kept needs its own
            self.weight.CB, self.weight.SCB = self.weight.data, state.SCB
            state.CB = state.SCB = None

    def dequantise(self, weight: Any) -> Tensor:
        return functional().int8_vectorwise_dequant(weight.data, weight.SCB)

    def requantised(self, dense: Tensor, like: Any) -> nn.Parameter:
        return type(like)(dense.detach().cpu(), requires_grad=False, has_fp16_weights=False).to(like.device)


def dense_of(layer: Any, weight: Any) -> Tensor:
    """(out, in) in floating point of `weight`, a quantised one of `layer`, adapted or not."""
    if isinstance(layer, _Quantised):
        return layer._dense(weight)
    if (state := getattr(weight, "quant_state", None)) is None:
        return functional().int8_vectorwise_dequant(weight.data, *constants(layer, weight))
    return LoRALinear4bit.dequantise(layer, weight).to(state.dtype)


def drop_quantisation(layer: nn.Module) -> None:
    """Take off `layer` what bitsandbytes' layers have and nn.Linear has not."""
    ours = _Quantised.own_attributes
    plain = vars(nn.Linear(1, 1, device="meta"))
    for key in [key for key in vars(layer) if key not in plain and key not in ours and not key.startswith("_")]:
        del layer.__dict__[key]
    layer._load_state_dict_pre_hooks.clear()


def as_plain(layer: Any, dtype: torch.dtype | None = None) -> None:
    """Turn a bitsandbytes layer without adapters into nn.Linear, in place, in the dtype that was quantised."""
    kind: Any = LoRALinear4bit if getattr(layer.weight, "quant_state", None) is not None else LoRALinear8bit
    layer.__class__ = adapted_class(kind, type(layer))
    layer.adopt(Route(Plan()))
    layer.weight = nn.Parameter(layer.dense_weight().to(dtype or layer.merged_dtype), requires_grad=False)
    strip(layer)
