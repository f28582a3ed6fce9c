"""||W + delta|| by output feature without forming W + delta, and when it has to be computed again.

Letters: N output features, K inputs, r rank. For a row w of W (N, K) and d = scale * (AB)ᵀ, with A (K, r), B (r, N):

    ||w + d||² = ||w||² + 2 scale (w A) · b + scale² (bᵀ AᵀA) · b        (b: the row's column of B)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .switch import without_autocast

if TYPE_CHECKING:
    from .layer import LoRALayerBase
    from .lora import LoraAdapter

_CHUNK = 1 << 20  # elements of W that are float32 at a time
_SAMPLE = 128
_CANCELLED = 0.01  # below this share of ||w||² + ||d||² a sum of float32 terms has lost too many digits
Key = tuple[Any, ...]


class NormCache:
    """The norms of one adapter in one layer, computed once for each state of its parameters.

    Parameters' versions tell: an optimizer step changes them, a checkpoint replay or a further micro batch
    does not. A copy of an adapter starts with an empty cache.
    """

    def __init__(self) -> None:
        self._base: tuple[Key, Tensor] | None = None  # (N,) ||w||²
        self._norm: tuple[Key, Tensor] | None = None  # (N,)

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()

    @torch.no_grad()
    def norm(self, layer: LoRALayerBase, adapter: LoraAdapter) -> Tensor:
        """(N,) in the factors' dtype."""
        base_key = state_of(layer.kept.get("weight", layer.weight))
        factors = state_of(adapter.lora_A), state_of(adapter.lora_B)
        key = None if base_key is None or None in factors else (base_key, *factors, adapter.scale)
        if key is not None and self._norm is not None and self._norm[0] == key:
            return self._norm[1]
        matrices = layer.matrices(adapter.lora_A, adapter.lora_B)
        assert matrices is not None
        if base_key is None or self._base is None or self._base[0] != base_key:
            self._base = (base_key or (object(),), squared_rows(matrices[0], adapter.lora_A.dtype))
        with without_autocast(adapter.lora_A.device.type):
            norm = factored_norm(*matrices, adapter.scale, self._base[1])
        self._norm = None if key is None else (key, norm)
        return norm


def state_of(tensor: Tensor) -> Key | None:
    """What changes when a tensor's values do; None if that cannot be told."""
    if tensor.is_inference() or tensor.is_meta:
        return None
    place = (tensor.data_ptr(), tensor._version, tensor.dtype, tensor.device, tuple(tensor.shape))
    return (*place, *_sample(tensor)) if tensor.device.type == "cpu" else place


def _sample(tensor: Tensor) -> list[float]:
    """Some values: writing through `.data` leaves the version as it is. Not on a device, where it would wait."""
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else tensor.detach().flatten()
    sampled: list[float] = flat[:: max(1, flat.numel() // _SAMPLE)].tolist()
    return sampled


def squared_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) -> (N,) ||w||², squared in `dtype` and added up in float64."""
    return torch.cat([rows.square().sum(1, dtype=torch.float64) for rows in _chunks(weight, dtype)])


def factored_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float, squared: Tensor) -> Tensor:
    """(N,) ||w + scale * (AB)ᵀ|| for W (N, K), A (K, r), B (r, N), squared (N,); never zero."""
    Bt, wide = B.T, squared.dtype
    cross = torch.cat([rows @ A for rows in _chunks(weight, A.dtype)])  # (N, r)
    ours = (Bt @ (A.T @ A) * Bt).sum(1, dtype=wide) * scale**2
    total = squared + ours + (cross * Bt).sum(1, dtype=wide) * (2 * scale)
    cancelled = (total <= _CANCELLED * (squared + ours)).nonzero().flatten()
    if len(cancelled):
        rows = weight[cancelled].to(A.dtype) + scale * (Bt[cancelled] @ A.T)
        total[cancelled] = rows.square().sum(1, dtype=wide)
    return total.clamp_min_(0).sqrt_().to(A.dtype).clamp_min_(torch.finfo(A.dtype).tiny)


def _chunks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of W in `dtype`, a few at a time if they have to be converted."""
    step = len(weight) if weight.dtype == dtype else max(1, _CHUNK // weight.shape[1])
    return (rows.to(dtype) for rows in weight.split(step))
