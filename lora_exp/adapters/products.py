"""Matrix products in the precision that a processor is fast in. Chosen by what it can do, never by a clock: one
seed gives the same numbers in every run.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import platform

import torch
from torch import Tensor

_CHUNK = 1 << 20  # elements of W that are float32 at a time
_FEW_ROWS = 128  # below, converting W costs more than it saves


def wide_product(grad: Tensor, weight: Tensor) -> Tensor:
    """G W for G (M, N) and W (N, K), (M, K), in W's dtype; in float32 where that is faster.

    A processor with AVX-512 but no AMX multiplies bfloat16 1.2 to 1.6 times slower than float32, conversion
    included. The sum is then returned as it is, so that what is added to it is not rounded twice.
    """
    if grad.device.type != "cpu" or weight.element_size() != 2 or len(grad) < _FEW_ROWS or _is_fast_in_half():
        return grad.to(weight.dtype) @ weight
    step = max(1, _CHUNK // weight.shape[1])
    total = torch.zeros(len(grad), weight.shape[1])
    for some, rows in zip(grad.split(step, 1), weight.split(step), strict=True):
        total.addmm_(some.float(), rows.float())
    return total


@functools.cache
def _is_fast_in_half() -> bool:
    """Anything but an x86 processor without AMX is taken at its word."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    known = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return bool(known is not None and known())
