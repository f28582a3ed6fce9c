"""One training step on the meta device, its memory and FLOPs counted operation by operation.

The step is the training's own: its objective, its loss head, its checkpointing. Every storage that an operation makes
is booked until it is gone, so that what is retained between forward and backward, and the highest point of the
step, are the real model's own, whatever its architecture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook

from lora_exp.models import checkpoint_layers
from lora_exp.plan.kernels import Kernels
from lora_exp.plan.layers import Layers
from lora_exp.plan.ledger import Ledger
from lora_exp.training.loss_head import refusal
from lora_exp.training.metrics import RowLosses
from lora_exp.training.objectives import Batch

_Found = TypeVar("_Found")


@dataclass(frozen=True)
class Work:
    """What a step computes: the objective's ``losses`` of ``model`` for ``batch``, all on the meta device.

    ``unpacked_bytes``: what a quantised weight takes while it is unpacked for a product, one at a time, none
    of them the head's.
    """

    model: nn.Module
    losses: Callable[[nn.Module, Batch], RowLosses]
    batch: Batch
    unpacked_bytes: int = 0


@dataclass(frozen=True)
class Step:
    """One micro step of training, in bytes.

    ``activation_bytes``: what the layers below the head keep for the backward pass; under checkpointing their
    inputs and what one layer keeps while it is recomputed. ``head_bytes``: the most that logits and loss add to
    them. ``peak_bytes``: the highest point of the pass, gradients of parameters left out. ``all_logits``: why the
    loss needs all logits at once; None if it does not, or there is no such head.
    """

    activation_bytes: int
    head_bytes: int
    peak_bytes: int
    flops: int
    all_logits: str | None = None


def trace_step(work: Work, kernels: Kernels, checkpointing: bool) -> Step:
    """Run ``work`` forward and backward. Raises ValueError where its layers cannot be checkpointed as wished."""
    work.model.train()
    layer_bytes = 0
    if checkpointing:
        layer_bytes = _settled(work, kernels, lambda one: one.largest_layer())
        # A layer is recomputed inside backward(), a call that takes ``kernels`` off until it ends.
        checkpoint_layers(work.model, context_fn=lambda: (contextlib.nullcontext(), kernels))
    step = _settled(work, kernels, lambda one: one.run())
    return replace(step, activation_bytes=step.activation_bytes + layer_bytes, all_logits=refusal(work.model))


def _settled(work: Work, kernels: Kernels, found: Callable[[_Pass], _Found]) -> _Found:
    """What a pass finds. One that learns that the head must give all logits runs the model twice, as no later one."""
    known = refusal(work.model)
    result = found(_Pass(work, kernels))
    return result if refusal(work.model) == known else found(_Pass(work, kernels))


class _Pass:
    """One forward and backward pass, with marks at the layers and at the head."""

    def __init__(self, work: Work, kernels: Kernels) -> None:
        self._work, self._kernels = work, kernels
        for parameter in work.model.parameters():  # as from the second micro step on; adding to one is in place
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        self._ledger = Ledger(work.model)
        self._layers = Layers(work.model, self._ledger, kernels)
        self._head_start: int | None = None
        self._trunk_peak = 0
        self._head_peak = 0

    def largest_layer(self) -> int:
        """The most bytes that one checkpointed layer keeps for its backward pass."""
        with self._ledger, self._kernels, self._layers:
            loss = self._loss()
            size = self._layers.largest()
            del loss
        return size

    def run(self) -> Step:
        ledger = self._ledger
        with ledger, self._marked_head(), self._layers:
            with self._kernels:
                loss = self._loss()
            kept = ledger.between(0, ledger.serial if self._head_start is None else self._head_start)
            loss.backward()
        head = 0 if self._head_start is None else max(0, (self._head_peak or ledger.peak) - kept)
        peak = max(max(self._trunk_peak, ledger.peak) + self._work.unpacked_bytes, self._head_peak)
        return Step(kept, head, peak, ledger.flops + self._layers.flops())

    def _loss(self) -> Tensor:
        return self._work.losses(self._work.model, self._work.batch).total.sum()

    @contextlib.contextmanager
    def _marked_head(self) -> Iterator[None]:
        """The head is the last to be called with its weight. It has no hook of its own, which would change the loss."""
        find = getattr(self._work.model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        if head is None:
            yield
            return

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if inputs and getattr(module, "weight", None) is head.weight:
                self._enter_head(inputs[0])

        hook = register_module_forward_pre_hook(enter)
        try:
            yield
        finally:
            hook.remove()

    def _enter_head(self, hidden: Tensor) -> None:
        self._head_start = self._ledger.serial
        self._trunk_peak = max(self._trunk_peak, self._ledger.restart_peak())
        if hidden.requires_grad:
            hidden.register_hook(self._leave_head)

    def _leave_head(self, gradient: Tensor) -> None:
        self._head_peak = self._ledger.restart_peak()
