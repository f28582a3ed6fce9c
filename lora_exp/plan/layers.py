"""The layers of a model while a step is traced: alike ones are run a few times and counted as often as they are.

Of layers alike the first ones and the last are run. What is between them is stood in for by a tensor of the bytes
that one of them retains until its own backward pass: the step's highest points, at the head and in the last
layer's backward pass, see all of them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer as _Layer

from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction
from lora_exp.plan.kernels import Kernels
from lora_exp.plan.ledger import Ledger

_NUMBERS = ("layer_idx", "layer_key")  # in which layers alike differ
_PLAIN = (bool, int, float, str, type(None))


@dataclass
class _Kind:
    """Layers alike whose input carries a gradient, or none. ``retained`` is None until one was seen to its end.

    ``copied``: what goes when autocast is left.
    """

    retained: int | None = None
    copied: int = 0
    stood_in: int = 0
    forward_flops: int = 0
    backward_flops: int = 0
    rest: tuple[object, ...] | None = None  # what it returns after its hidden states; None: those alone


class Layers:
    """A context in which the layers of ``model`` are run once a kind. Made for one pass."""

    def __init__(self, model: nn.Module, ledger: Ledger, kernels: Kernels) -> None:
        self._ledger, self._kernels = ledger, kernels
        self._alike = {m: _signature(m) for m in model.modules() if isinstance(m, _Layer)}
        self._left = Counter(self._alike.values())
        self._kinds: dict[tuple[int, bool], _Kind] = {}
        self._spans: list[tuple[int, int, int]] = []  # of a layer that was run: serial numbers and its output's bytes
        self._open: tuple[_Kind, int] | None = None  # the layer before, and what was live at its start

    def __enter__(self) -> Layers:
        for layer in self._alike:
            layer.forward = lambda *args, _layer=layer, **kwargs: self._call(_layer, args, kwargs)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self._alike:
            del layer.forward  # the class's own is behind it

    def largest(self) -> int:
        """The most bytes that a layer which was run keeps for its backward pass, its input and output left out."""
        return max((self._ledger.between(first, last) - output for first, last, output in self._spans), default=0)

    def flops(self) -> int:
        """Those of the layers that were not run, after the backward pass."""
        return sum(kind.stood_in * (kind.forward_flops + kind.backward_flops) for kind in self._kinds.values())

    def _call(self, layer: _Layer, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
        self._close()
        alike, carries = self._alike[layer], bool(args) and args[0].requires_grad
        self._left[alike] -= 1
        kind = self._kinds.setdefault((alike, carries), _Kind())
        if kind.retained is not None and self._left[alike]:
            kind.stood_in += 1
            self._kernels.keep(kind.copied)
            hidden = _StandIn.apply(args[0], kind.retained)
            return hidden if kind.rest is None else (hidden, *kind.rest)
        return self._run(kind, layer, args, kwargs)

    def _run(self, kind: _Kind, layer: _Layer, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> object:
        ledger, is_first = self._ledger, not self._spans
        live, serial, flops, copied = ledger.live, ledger.serial, ledger.flops, self._kernels.copied_bytes()
        out = type(layer).forward(layer, *args, **kwargs)
        hidden, *rest = out if isinstance(out, tuple) else (out,)
        self._spans.append((serial, ledger.serial, hidden.untyped_storage().nbytes()))
        # What the first layer makes for all of them (masks, positions) is not retained again.
        if not is_first and kind.retained is None and _is_regular(args, hidden, rest):
            kind.forward_flops = ledger.flops - flops
            kind.rest = tuple(rest) if isinstance(out, tuple) else None
            if layer.gradient_checkpointing:  # else the backward pass keeps the copies
                kind.copied = self._kernels.copied_bytes() - copied
            self._watch_backward(kind, args[0], hidden)
            self._open = (kind, live)
        return out

    def _close(self) -> None:
        if self._open is not None:
            kind, live = self._open
            kind.retained = max(0, self._ledger.live - live - kind.copied)
            self._open = None

    def _watch_backward(self, kind: _Kind, hidden: Tensor, out: Tensor) -> None:
        def start(_: Tensor) -> None:
            kind.backward_flops -= self._ledger.flops

        def stop(_: Tensor) -> None:
            kind.backward_flops += self._ledger.flops

        if hidden.requires_grad:
            out.register_hook(start)
            hidden.register_hook(stop)


class _StandIn(TensorFunction):
    """Hidden states as they are; what a layer would retain is retained until its backward pass."""

    @staticmethod
    def forward(ctx: Context, hidden: Tensor, retained: int) -> Tensor:
        ctx.save_for_backward(torch.empty(retained, dtype=torch.uint8, device=hidden.device))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def _is_regular(args: tuple[Tensor, ...], hidden: Tensor, rest: list[object]) -> bool:
    """Whether all that a layer passes on are hidden states like those it got."""
    passed = any(isinstance(value, Tensor) for value in rest)
    return bool(args) and (args[0].shape, args[0].dtype) == (hidden.shape, hidden.dtype) and not passed


def _signature(layer: nn.Module) -> int:
    """Equal for layers that do the same to tensors of the same shape."""
    facts: list[object] = []
    for name, module in layer.named_modules():
        facts.append((name, type(module)))
        plain = [(key, value) for key, value in vars(module).items() if isinstance(value, _PLAIN)]
        facts += [fact for fact in plain if fact[0] not in _NUMBERS]
        tensors = [*module._parameters.items(), *module._buffers.items()]
        facts += [(key, tuple(t.shape), t.dtype, t.requires_grad) for key, t in tensors if t is not None]
    return hash(tuple(facts))
