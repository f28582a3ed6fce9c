"""Matrix products in the precision that a processor is fast in. Chosen by what it can do, never by a clock: one
seed gives the same numbers in every run.

An x86 processor without AMX multiplies bfloat16 1.2 to 1.8 times slower than float32, conversion included. There
the whole of an adapted layer runs in float32, and only what goes in, comes out or is kept is rounded to 16 bits.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import platform

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 1 << 20  # elements of W that are float32 at a time
_FEW_ROWS = 128  # below, converting W costs more than it saves


def runs_wide(dtype: torch.dtype, kind: str, rows: int) -> bool:
    """Whether products of this dtype on devices of this kind had better run in float32."""
    return kind == "cpu" and dtype.itemsize == 2 and rows >= _FEW_ROWS and not _is_fast_in_half()


def times_transposed(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ for x (M, K) and W (N, K), (M, N) in x's dtype; another dtype of W is converted some rows at a time."""
    if weight.dtype is x.dtype:
        return F.linear(x, weight)
    out, start = x.new_empty(len(x), len(weight)), 0
    for rows in weight.split(max(1, _CHUNK // weight.shape[1])):
        torch.mm(x, rows.to(x.dtype).T, out=out[:, start : start + len(rows)])
        start += len(rows)
    return out


def add_product(total: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """total (M, K) += G W for G (M, N) and W (N, K), all of one dtype but W, which is converted as above."""
    if weight.dtype is grad.dtype:
        return total.addmm_(grad, weight)
    step = max(1, _CHUNK // weight.shape[1])
    for some, rows in zip(grad.split(step, 1), weight.split(step), strict=True):
        total.addmm_(some, rows.to(grad.dtype))
    return total


def wide_product(grad: Tensor, weight: Tensor) -> Tensor:
    """G W for G (M, N) and W (N, K), (M, K), in W's dtype, or in float32 where that is faster: the sum is then
    returned as it is, so that what is added to it is not rounded twice."""
    if not runs_wide(weight.dtype, grad.device.type, len(grad)):
        return grad.to(weight.dtype) @ weight
    return add_product(torch.zeros(len(grad), weight.shape[1]), grad.float(), weight)


@functools.cache
def _is_fast_in_half() -> bool:
    """Anything but an x86 processor without AMX is taken at its word."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known is not None and known())
