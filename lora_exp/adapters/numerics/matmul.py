"""Matrix products in the precision, and by the library, that a machine is fast in (see `precision`).

Where float32 products are faster than 16-bit ones, conversion included, the whole of an adapted layer runs in float32,
and only what goes in, comes out or is kept is rounded to 16 bits.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_exp.adapters.numerics.precision import FLOAT32, FLOAT32_FEW, ONEDNN, answers, onednn_product, onednn_sum

_CHUNK = 1 << 20  # elements of W that are float32 at a time
_FEW_ROWS = 128  # below, converting W costs more than it saves
_FEWER_ROWS = 8  # where they are far slower: on AVX2 x Wᵀ gains from 4 rows on (a vocabulary's from 32), G W from 2


def runs_wide(dtype: torch.dtype, kind: str, rows: int) -> bool:
    """Whether products of this dtype on devices of this kind had better run in float32."""
    if kind != "cpu" or dtype.itemsize != 2 or rows < min(_FEW_ROWS, _FEWER_ROWS):
        return False
    how = answers().bf16
    return how == FLOAT32_FEW or (how == FLOAT32 and rows >= _FEW_ROWS)


def uses_onednn(dtype: torch.dtype, kind: str, rows: int) -> bool:
    """Whether products of this dtype are made by oneDNN. It has no gradient here: for hand-written passes alone."""
    return kind == "cpu" and dtype is torch.float32 and rows >= _FEW_ROWS and answers().float32 == ONEDNN


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ for x (M, K) and W (N, K), (M, N) in x's dtype; another dtype of W is converted some rows at a time."""
    by_onednn = uses_onednn(x.dtype, x.device.type, x.shape[0])
    if weight.dtype is x.dtype:
        return onednn_product(x, weight) if by_onednn else F.linear(x, weight)
    out, start = x.new_empty(x.shape[0], weight.shape[0]), 0
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        here = out[:, start : start + len(rows)]
        if by_onednn:
            here.copy_(onednn_product(x, rows.to(x.dtype)))
        else:
            torch.mm(x, rows.to(x.dtype).T, out=here)
        start += len(rows)
    return out


def times(grad: Tensor, weight: Tensor) -> Tensor:
    """G W for G (M, N) and W (N, K), (M, K) in G's dtype; another dtype of W is converted as above."""
    by_onednn = uses_onednn(grad.dtype, grad.device.type, grad.shape[0])
    if weight.dtype is grad.dtype:
        return onednn_product(grad, weight.T) if by_onednn else torch.mm(grad, weight)
    step, total = max(1, _CHUNK // weight.shape[1]), None
    for some, rows in zip(grad.split(step, 1), weight.split(step), strict=True):
        rows = rows.to(grad.dtype)
        if total is None:
            total = onednn_product(some, rows.T) if by_onednn else torch.mm(some, rows)
        else:
            total = onednn_sum(total, some, rows) if by_onednn else total.addmm_(some, rows)
    assert total is not None
    return total


def factor_product(narrow: Tensor, wide: Tensor, factor: float) -> Tensor:
    """factor * Tᵀ X for T (M, r) and X (M, K), (r, K) in their dtype: a factor's gradient."""
    if uses_onednn(wide.dtype, wide.device.type, wide.shape[0]):
        return onednn_product(narrow.T, wide.T).mul_(factor)
    product = wide.new_empty(narrow.shape[1], wide.shape[1])
    return torch.addmm(product, narrow.T, wide, beta=0, alpha=factor)


def wide_product(grad: Tensor, weight: Tensor) -> Tensor:
    """G W for G (M, N) and W (N, K), (M, K), in W's dtype, or in float32 where that is faster: the sum is then
    returned as it is, so that what is added to it is not rounded twice."""
    is_wide = runs_wide(weight.dtype, grad.device.type, grad.shape[0])
    return times(grad.float() if is_wide else grad.to(weight.dtype), weight)
