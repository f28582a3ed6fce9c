"""Adapted linear layers of bitsandbytes: QLoRA and QDoRA (arXiv 2305.14314) on 4-bit and 8-bit bases.

Known by name, so that bitsandbytes is imported only by who builds such a layer or brings one.

Letters: out / in the layer's features, ... any leading dimensions.
"""

from __future__ import annotations

import copy
import functools
import importlib
from collections.abc import Callable
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import strip
from lora_exp.adapters.layers.linear import LoRALinear
from lora_exp.adapters.layers.registry import adapted_class, adapts
from lora_exp.adapters.numerics.packed_weights import (
    EightBit,
    EightBitState,
    FourBit,
    bring_constants,
    constants,
    functional,
    is_quantised,
    keep_trainable,
    quant_state,
    recover_class,
)
from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction
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

    def __new__(cls, *args: object, **kwargs: object) -> _Quantised:
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
        **quantisation: object,
    ) -> None:
        """`quantisation` goes to the bitsandbytes layer; as there, `.to(device)` is what quantises."""
        assert self.made_from is not None
        self.made_from[1].__init__(self, in_features, out_features, bias, **quantisation)
        self.begin(rank, lora_alpha, lora_dropout, use_rslora)

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        weight = module.weight
        if not (is_quantised(weight) or (isinstance(weight, Tensor) and weight.is_meta)):
            return "its weight is not quantised yet; move the model with .to(device) first, which quantises it"
        return super().refusal(module, rank)

    @classmethod
    def largest_rank(cls, module: nn.Module) -> int:
        assert isinstance(module, nn.Linear)
        return max(module.in_features, module.out_features)

    # The dense weight

    def dequantise(self, weight: Tensor) -> Tensor:
        """(out, in) in floating point, of a weight of this layer."""
        raise NotImplementedError

    def dense_weight(self) -> Tensor:
        shared = self._shared
        return shared() if shared is not None else self._dense(self.kept.get("weight", self.weight))

    @property
    def merged_dtype(self) -> torch.dtype:
        state = quant_state(self.kept.get("weight", self.weight))
        return state.dtype if state is not None else self.compute_dtype or torch.float32

    def plain_class(self) -> type[nn.Module]:
        if is_quantised(self.weight):
            return super().plain_class()
        drop_quantisation(self)
        return nn.Linear

    def along_weight(self, values: Tensor) -> Tensor:
        return values.view(-1, 1)

    def _dense(self, weight: Tensor) -> Tensor:
        with torch.no_grad():
            return self.dequantise(weight) if is_quantised(weight) else weight.detach()

    # Calls

    def forward(self, input: Tensor) -> Tensor:
        self._shared = _Once(functools.partial(self._dense, self.weight))
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

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for weight in (self.weight, self.kept.get("weight")):
            recover_class(weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Quantised:
        was_quantised = is_quantised(self.weight)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        bring_constants(self.weight)
        if is_quantised(self.weight) and not was_quantised:
            for adapter in self.adapters.values():
                adapter.base_loaded(self)  # type: ignore[operator]
        return self


class _Context(Context, Protocol):
    again: Callable[[], Tensor]


class _Product(TensorFunction):
    """x Wᵀ for a frozen W that backward makes again instead of keeping it."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, dense: Tensor, again: Callable[[], Tensor]) -> Tensor:
        ctx.again = again
        return F.linear(x, dense)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, None, None]:
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

    def dequantise(self, weight: Tensor) -> Tensor:
        return _unpacked(weight, self.compute_dtype)

    def requantised(self, dense: Tensor, like: nn.Parameter) -> nn.Parameter:
        packed, make = cast(FourBit, like), cast("Callable[..., nn.Parameter]", type(like))
        state = packed.quant_state
        made = make(
            dense.detach().to(state.dtype).cpu(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=packed.quant_storage,
        )
        return cast(nn.Parameter, made.to(like.device))


@adapts(f"{_MODULES}.Linear8bitLt")
class LoRALinear8bit(_Quantised):
    __doc__ = _Quantised.__doc__
    base_name = "Linear8bitLt"

    def __init__(self, *args: Any, has_fp16_weights: bool = False, **options: Any) -> None:
        super().__init__(*args, has_fp16_weights=has_fp16_weights, **options)

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        if cast(EightBitState, module.state).has_fp16_weights:
            return "has_fp16_weights=True keeps its weight in 16 bits; build it with has_fp16_weights=False"
        return super().refusal(module, rank)

    def adopt(self, route: Route) -> None:
        super().adopt(route)
        state, packed = cast(EightBitState, self.state), cast(EightBit, self.weight)
        if state.SCB is not None:  # bitsandbytes' first call moved the constants; a weight that is kept needs its own
            packed.CB, packed.SCB = packed.data, state.SCB
            state.CB = state.SCB = None

    def dequantise(self, weight: Tensor) -> Tensor:
        dense: Tensor = functional().int8_vectorwise_dequant(weight.data, cast(EightBit, weight).SCB)
        return dense

    def requantised(self, dense: Tensor, like: nn.Parameter) -> nn.Parameter:
        make = cast("Callable[..., nn.Parameter]", type(like))
        made = make(dense.detach().cpu(), requires_grad=False, has_fp16_weights=False)
        return cast(nn.Parameter, made.to(like.device))


def dense_of(layer: nn.Module, weight: Tensor) -> Tensor:
    """(out, in) in floating point of `weight`, a quantised one of `layer`, adapted or not."""
    if isinstance(layer, _Quantised):
        return layer._dense(weight)
    if (state := quant_state(weight)) is None:
        dense: Tensor = functional().int8_vectorwise_dequant(weight.data, *constants(layer, weight))
        return dense
    return _unpacked(weight, getattr(layer, "compute_dtype", None)).to(state.dtype)


def _unpacked(weight: Tensor, compute_dtype: torch.dtype | None) -> Tensor:
    """(out, in) of a 4-bit weight, for products in that dtype."""
    packed = cast(FourBit, weight).quant_state
    state = copy.copy(packed)
    # A product in float32 takes the values as they are, not rounded to the dtype that was quantised.
    state.dtype = torch.promote_types(state.dtype, compute_dtype or torch.float32)
    if state.shape[-1] % state.blocksize:  # bitsandbytes 0.50 misreads blocks across rows on a CPU
        state.shape = torch.Size((1, state.shape.numel()))
    dense: Tensor = functional().dequantize_4bit(weight.data, state)
    return dense.view(packed.shape)


def drop_quantisation(layer: nn.Module) -> None:
    """Take off `layer` what bitsandbytes' layers have and nn.Linear has not."""
    ours = _Quantised.own_attributes
    plain = vars(nn.Linear(1, 1, device="meta"))
    for key in [key for key in vars(layer) if key not in plain and key not in ours and not key.startswith("_")]:
        del layer.__dict__[key]
    layer._load_state_dict_pre_hooks.clear()


def as_plain(layer: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Turn a bitsandbytes layer without adapters into nn.Linear, in place, in the dtype that was quantised."""
    kind = LoRALinear8bit if quant_state(layer.weight) is None else LoRALinear4bit
    layer.__class__ = adapted_class(kind, type(layer))
    adapted = cast(_Quantised, layer)
    adapted.adopt(Route(Plan()))
    adapted.weight = nn.Parameter(adapted.dense_weight().to(dtype or adapted.merged_dtype), requires_grad=False)
    strip(adapted)
