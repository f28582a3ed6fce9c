"""What a real device would do where the meta device does otherwise: fused attention, grouped products, mixed dtypes,
autocast."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lora_exp.adapters.numerics.autocast import autocast_dtype, autocast_on_meta

_PRODUCTS = {F.linear, F.conv2d, torch.matmul, torch.bmm, torch.addmm, Tensor.matmul, Tensor.__matmul__}
_GROUPED = getattr(torch, "_grouped_mm", None)  # below torch.nn.functional.grouped_mm
_Inputs = tuple[Any, ...]
_HALVES = (torch.bfloat16, torch.float16)


class Kernels(TorchFunctionMode):
    """Calls reach the meta device as they would reach ``device_type``.

    The meta device knows attention only as explicit scores (B, H, T, T). Every device's fused kernel keeps q, k, v,
    the output and a log-sum-exp instead; the CPU's is taken for all of them, as its shapes are theirs.

    ``four_bit``: a quantised layer without adapter answers in its input's dtype, also under autocast; an 8-bit one
    in autocast's.
    """

    def __init__(self, device_type: str, autocast: torch.dtype | None = None, four_bit: bool = False) -> None:
        super().__init__()
        self._four_bit = four_bit
        self._device_type = device_type
        self._wanted = autocast
        self._entered: list[contextlib.AbstractContextManager[None]] = []
        self._copies: dict[int, Tensor] = {}

    def __enter__(self) -> Kernels:
        self._entered.append(autocast_on_meta(self._wanted))
        self._entered[-1].__enter__()
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        super().__exit__(kind, error, at)  # type: ignore[no-untyped-call]
        self._entered.pop().__exit__(kind, error, at)
        if not self._entered:
            self._copies.clear()

    def copied_bytes(self) -> int:
        """What the copies of weights take that autocast keeps until it is left."""
        return sum(copy.nbytes for copy in self._copies.values())

    def keep(self, size: int) -> None:
        """Keep as many bytes with these copies."""
        self._copies[-1 - len(self._copies)] = torch.empty(size, dtype=torch.uint8, device="meta")

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: _Inputs = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is _GROUPED:
            return _grouped(*args, **kwargs)
        autocast = autocast_dtype("meta")
        if func is F.linear and (self._four_bit or autocast is None) and _is_quantised(*args, **kwargs):
            return self._mixed_linear(*args, **kwargs)
        if func in _PRODUCTS and autocast is not None:
            args = tuple(self._cast(value) if isinstance(value, Tensor) else value for value in args)
            kwargs = {name: self._cast(value) if isinstance(value, Tensor) else value for name, value in kwargs.items()}
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query, key, value = self._cast(query), self._cast(key), self._cast(value)
        if dropout_p > 0 and self._device_type == "cpu":  # its fused kernel has no dropout
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype != torch.bool:
            attn_mask = attn_mask.to(query.dtype)
        elif attn_mask is not None:  # a bool mask is made additive
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(attn_mask, 0)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out

    def _mixed_linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A quantised layer computes in its own dtype and answers in its input's."""
        own = None if bias is None else bias.to(weight.dtype)
        return F.linear(input.to(weight.dtype), weight, own).to(input.dtype)

    def _cast(self, value: Tensor) -> Tensor:
        dtype = autocast_dtype("meta")
        if dtype is None or value.dtype != torch.float32:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self._copies:  # autocast keeps its copies of weights for the whole pass
            self._copies[id(value)] = value.to(dtype)
        return self._copies[id(value)]


def _grouped(x: Tensor, weight: Tensor, **_: object) -> Tensor:
    """x (S, in) by weight (E, in, out), each expert's rows by its own: the meta device knows it in bfloat16 alone.

    It has no values to say how many rows each expert has, so all have as many; the work is the same.
    """
    experts, rows = len(weight), -(-len(x) // len(weight))
    even = x if len(x) == experts * rows else F.pad(x, (0, 0, 0, experts * rows - len(x)))
    return torch.bmm(even.view(experts, rows, -1), weight).flatten(0, 1)[: len(x)]


def _is_quantised(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    """What is not quantised of such a base is float32, as are the activations between its layers."""
    return input.dtype == torch.float32 and weight.dtype in _HALVES
