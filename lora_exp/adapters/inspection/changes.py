"""What an adapter adds to each layer's weight, taken apart by its singular values.

Letters: N output features, K inputs (of a convolution, input channels times kernel), r rank, k singular values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from lora_exp.adapters.inspection.low_rank import is_plain
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.layers.adapted import LoRALayerBase
from lora_exp.adapters.variants.lora import LoraAdapter


@dataclasses.dataclass(frozen=True)
class Change:
    """``U`` (N, k), ``S`` (k,) falling, ``V`` (K, k): the change of a layer's weight as a matrix (N, K) is U S Vᵀ.

    In float32. ``weight()`` is the base's (N, K), dense. ``is_dense``: whether the change had to be formed to be taken
    apart, as the variant's is no product of two factors (DoRA's).
    """

    layer: str
    layer_type: str
    U: Tensor
    S: Tensor
    V: Tensor
    weight: Callable[[], Tensor]
    is_dense: bool


@torch.no_grad()
def changes(model: nn.Module, name: str) -> Iterator[Change]:
    """Those of an adapter's layers, one at a time. Layers of `unmeasured` are left out."""
    for layer_name, layer in _adapted(model, name):
        adapter = layer.adapter_named(name)
        matrices = layer.matrices(*adapter.factors(layer))
        if matrices is None:
            continue
        _, A, B = matrices
        parts = _by_factors(A, B, adapter.scale) if is_plain(type(adapter)) else _by_values(layer, adapter)

        def dense(layer: LoRALayerBase = layer) -> Tensor:
            return _matrix(layer, layer.dense_weight())

        yield Change(layer_name, layer.layer_type, *parts, dense, not is_plain(type(adapter)))


def unmeasured(model: nn.Module, name: str) -> list[str]:
    """The adapted layers whose weight is many matrices: grouped convolutions and stacks of experts."""
    return [key for key, layer in _adapted(model, name) if layer.matrices(*_factors(layer, name)) is None]


def _adapted(model: nn.Module, name: str) -> Iterator[tuple[str, LoRALayerBase]]:
    return ((key, layer) for key, layer in lora_layers(model) if name in layer.adapters)


def _factors(layer: LoRALayerBase, name: str) -> tuple[Tensor, Tensor]:
    return layer.adapter_named(name).factors(layer)


def _by_factors(A: Tensor, B: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """For A (K, r) and B (r, N): the (N, K) product is never formed, as BᵀAᵀ = Q (R Tᵀ) Pᵀ and the middle is (r, r)."""
    Q, R = torch.linalg.qr(B.T.double())  # (N, r), (r, r)
    P, T = torch.linalg.qr(A.double())  # (K, r), (r, r)
    U, S, Vt = torch.linalg.svd(R @ T.T * scale)
    return (Q @ U).float(), S.float(), (P @ Vt.T).float()


def _by_values(layer: LoRALayerBase, adapter: LoraAdapter) -> tuple[Tensor, Tensor, Tensor]:
    """By what merging would add, which is formed."""
    merged = _matrix(layer, adapter.merged(layer)).double()
    U, S, Vt = torch.linalg.svd(merged - _matrix(layer, layer.dense_weight()).double(), full_matrices=False)
    return U.float(), S.float(), Vt.T.float()


def _matrix(layer: LoRALayerBase, weight: Tensor) -> Tensor:
    """A weight in the layer's own shape as (N, K)."""
    return weight.movedim(layer.out_axis, 0).flatten(1)
