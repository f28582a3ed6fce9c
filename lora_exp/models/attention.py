"""Scaled-dot-product attention whose backward pass is computed in float32 where the CPU's 16-bit one is slow.

torch's fused attention has no fast 16-bit backward pass on a CPU for short sequences: at 128 positions it took five
times as long as in float32. Forward, and what is kept for backward, stay as they are.

Letters: B batch, H heads, T positions, D width of a head.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from lora_exp.adapters.numerics.first_derivative import first_derivative_only
from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction

NAME = "sdpa_float32_backward"
_SHORT = 256  # positions; beyond, 16-bit products gain more than the small blocks of a short sequence lose
_SPECIAL = ("position_bias", "softcap", "s_aux", "cache")  # what some models ask of attention beside the plain formula

AttentionMaskInterface.register(NAME, sdpa_mask)


def take_attention(model: PreTrainedModel) -> None:
    """Let a model of 16 bits on a CPU that attends by SDPA use this for training. Raises nothing: others stay."""
    weights = next(model.parameters())
    if weights.device.type == "cpu" and weights.dtype.itemsize == 2 and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation(NAME)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' interface: query (B, H, T, D), key and value (B, H or fewer, T, D) -> (B, T, H, D)."""
    is_plain = not dropout and all(others.get(name) is None for name in _SPECIAL)
    if not (is_plain and _is_slow_in_half(query, key, value, attention_mask)):
        found = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
        return found[0], None
    groups = query.shape[1] // key.shape[1]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = _Attention.apply(query, repeat_kv(key, groups), repeat_kv(value, groups), bool(is_causal), scale)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)


def _is_slow_in_half(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    trains = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_half = query.dtype.itemsize == 2 and query.device.type == "cpu"
    fits = mask is None and query.shape[2] == key.shape[2] <= _SHORT and key.shape == value.shape
    return trains and is_half and fits and query.shape[2] > 1 and not torch.compiler.is_compiling()


class _Context(Context, Protocol):
    is_causal: bool
    scale: float


class _Attention(TensorFunction):
    """(query, key, value (B, H, T, D), is_causal, scale) -> (B, H, T, D)"""

    @staticmethod
    def forward(ctx: _Context, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float) -> Tensor:
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out: Tensor
        out, logsumexp = attention(query, key, value, 0.0, is_causal, scale=scale)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.is_causal, ctx.scale = is_causal, scale
        return out

    @staticmethod
    @first_derivative_only("use model.attention=eager")
    def backward(ctx: _Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *halves, logsumexp = ctx.saved_tensors
        wide = [tensor.float() for tensor in (grads[0], *halves)]
        attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        found = attention(*wide, logsumexp.float(), 0.0, ctx.is_causal, scale=ctx.scale)
        return (*(gradient.to(halves[0].dtype) for gradient in found), None, None)
