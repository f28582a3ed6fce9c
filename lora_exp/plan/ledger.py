"""Memory and FLOPs of what runs on the meta device, booked operation by operation."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_ITEM = _aten._local_scalar_dense.default
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}

_Inputs = tuple[Any, ...]
_Named = dict[str, object]


class Ledger(TorchDispatchMode):
    """Books every storage made while it is active: ``live`` bytes now, ``peak`` since it was last reset."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._outside = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.booked: dict[int, tuple[int, int]] = {}  # storage -> (its serial number, bytes)
        self.serial = self.live = self.peak = self.flops = 0

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: _Inputs = (), kwargs: _Named | None = None
    ) -> object:
        if func is _ITEM and args[0].is_meta:
            # A model that looks into a tensor asks whether its mask or positions are plain: in full blocks they are.
            return args[0].dtype == torch.bool
        if func is _aten.index.Tensor:
            args = (args[0], _all_chosen(args[1]))
        out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._book(value.untyped_storage())
        return out

    def between(self, first: int, last: int) -> int:
        """Bytes of what was made from serial number ``first`` up to ``last`` and is still there."""
        return sum(size for serial, size in self.booked.values() if first <= serial < last)

    def restart_peak(self) -> int:
        """Count the peak from what is live now on; returns what it was so far."""
        before, self.peak = self.peak, self.live
        return before

    def _book(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.booked or key in self._outside:
            return
        self.booked[key] = (self.serial, storage.nbytes())
        self.serial += 1
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key).atexit = False

    def _release(self, key: int) -> None:
        self.live -= self.booked.pop(key)[1]


def _all_chosen(indices: list[Tensor | None]) -> list[Tensor | None]:
    """``indices`` with masks, whose values the meta device has not, as choosing all: the most that they can."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is None or index.dtype != torch.bool:
            found.append(index)
        else:
            found += [torch.empty(index.numel(), dtype=torch.long, device=index.device)] * index.dim()
    return found


def _flops(func: OpOverload, args: _Inputs, kwargs: _Named, out: object) -> int:
    packet = func._overloadpacket
    if packet in _ATTENTION:  # two products of (T, D) and (D, T) a head; their five backward, the scores again included
        query, products = args[_ATTENTION[packet][0]], _ATTENTION[packet][1]
        key = args[_ATTENTION[packet][0] + 1]
        return int(2 * products * query.numel() * key.shape[-2])
    if packet is _aten.addmm_:
        packet = _aten.addmm  # the registry knows products by their functional form
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
