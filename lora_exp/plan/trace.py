"""One training step on the meta device, its memory and FLOPs counted operation by operation.

Every storage that an operation makes is booked until it is gone, so that what is retained between forward and
backward, and the highest point of the step, are the real model's own, whatever its architecture.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers.modeling_layers import GradientCheckpointingLayer

from lora_exp.models import checkpoint_layers
from lora_exp.plan.kernels import Kernels
from lora_exp.training.objectives import losses_from_logits

_ITEM = torch.ops.aten._local_scalar_dense.default
_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: (0, 2),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: (1, 5),
}


@dataclass(frozen=True)
class Step:
    """One micro step of training, in bytes.

    ``activation_bytes``: what the layers below the head keep for the backward pass; under checkpointing their
    inputs and what one layer keeps while it is recomputed. ``head_bytes``: the most that logits and loss add to
    them. ``peak_bytes``: the highest point of the pass, gradients of parameters left out.
    """

    activation_bytes: int
    head_bytes: int
    peak_bytes: int
    flops: int


def trace_step(model: nn.Module, rows: int, length: int, kernels: Kernels, checkpointing: bool) -> Step:
    """Run ``rows`` blocks of ``length`` tokens through ``model``, all on the meta device, forward and backward."""
    model.train()
    layer_bytes = 0
    if checkpointing:
        layer_bytes = _Pass(model, rows, length).largest_layer(kernels)
        # A layer is recomputed inside backward(), a call that takes ``kernels`` off until it ends.
        checkpoint_layers(model, context_fn=lambda: (contextlib.nullcontext(), kernels))
    step = _Pass(model, rows, length).run(kernels)
    return Step(step.activation_bytes + layer_bytes, step.head_bytes, step.peak_bytes, step.flops)


class Ledger(TorchDispatchMode):
    """Books every storage made while it is active: ``live`` bytes now, ``peak`` since it was last reset."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [*model.parameters(), *model.buffers()]
        tensors += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        self._outside = {tensor.untyped_storage()._cdata for tensor in tensors}
        self.booked: dict[int, tuple[int, int]] = {}  # storage -> (its serial number, bytes)
        self.serial = self.live = self.peak = self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ITEM and args[0].is_meta:
            # A model that looks into a tensor asks whether its mask or positions are plain: in full blocks they are.
            return args[0].dtype == torch.bool
        out = func(*args, **(kwargs or {}))
        self.flops += _flops(func, args, kwargs or {}, out)
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor):
                self._book(value.untyped_storage())
        return out

    def between(self, first: int, last: int) -> int:
        """Bytes of what was made from serial number ``first`` up to ``last`` and is still there."""
        return sum(size for serial, size in self.booked.values() if first <= serial < last)

    def _book(self, storage: Any) -> None:
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


class _Pass:
    """One forward and backward pass, with marks at the layers and at the head."""

    def __init__(self, model: nn.Module, rows: int, length: int) -> None:
        self._model = model
        self._ids = torch.zeros(rows, length, dtype=torch.long, device="meta")
        for parameter in model.parameters():  # as from the second micro step on; adding to one is in place
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        self._ledger = Ledger(model)
        self._layers: list[list[int]] = []
        self._head_start = 0
        self._head_peak = 0

    def largest_layer(self, kernels: Kernels) -> int:
        """The most bytes that one checkpointed layer keeps for its backward pass."""
        with self._ledger, kernels, self._marked():
            loss = self._loss()
            sizes = [self._ledger.between(first, last) - output for first, last, output in self._layers]
            del loss
        return max(sizes, default=0)

    def run(self, kernels: Kernels) -> Step:
        ledger = self._ledger
        with ledger, self._marked():
            with kernels:
                loss = self._loss()
            kept = ledger.between(0, self._head_start)
            loss.backward()
        head = max(self._head_peak or ledger.peak, 0) - kept
        return Step(kept, max(head, 0), ledger.peak, ledger.flops)

    def _loss(self) -> Tensor:
        # Of all logits: the head without them looks at the labels' values, and the meta device has none.
        return losses_from_logits(self._model, {"input_ids": self._ids, "labels": self._ids}).total.sum()

    @contextlib.contextmanager
    def _marked(self) -> Iterator[None]:
        model: Any = self._model
        hooks = [model.get_output_embeddings().register_forward_pre_hook(self._enter_head)]
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                hooks.append(module.register_forward_pre_hook(self._enter_layer))
                hooks.append(module.register_forward_hook(self._leave_layer))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _enter_head(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._head_start = self._ledger.serial
        if inputs[0].requires_grad:
            inputs[0].register_hook(self._leave_head)

    def _leave_head(self, gradient: Tensor) -> None:
        self._head_peak = self._ledger.peak

    def _enter_layer(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._layers.append([self._ledger.serial, 0, 0])

    def _leave_layer(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        self._layers[-1][1:] = [self._ledger.serial, hidden.untyped_storage().nbytes()]  # the next one's input


def _flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func._overloadpacket
    if packet in _ATTENTION:  # two products of (T, D) and (D, T) a head; their five backward, the scores again included
        query, products = args[_ATTENTION[packet][0]], _ATTENTION[packet][1]
        key = args[_ATTENTION[packet][0] + 1]
        return 2 * products * query.numel() * key.shape[-2]
    if packet is torch.ops.aten.addmm_:
        packet = torch.ops.aten.addmm  # the registry knows products by their functional form
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) if formula else 0
