"""Next-token cross-entropy without all logits: exact, in chunks, gradient included.

Letters: n predictions that count, D hidden width, V vocabulary, B rows, T positions, c chunk.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lora_exp.adapters.numerics.autocast import autocast_dtype, without_autocast
from lora_exp.adapters.numerics.first_derivative import first_derivative_only
from lora_exp.adapters.numerics.matmul import runs_wide, times_transposed, wide_product
from lora_exp.adapters.numerics.typed_torch import Context, TensorFunction

log = logging.getLogger(__name__)
_CHUNK = 1 << 23  # logits at a time: 32 MiB in float32
_refused: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()


def row_losses(model: nn.Module, inputs: Mapping[str, Tensor], labels: Tensor, ignored: int) -> Tensor | None:
    """(B,) sums of a row's next-token losses, labels (B, T); None, with one log line, where the model's head
    is not a plain linear layer on its last hidden states."""
    if not isinstance(model, nn.Module) or model in _refused:
        return None
    head, reason = _plain_head(model)
    if head is not None:
        hidden, reason = _hidden(model, inputs, head)
        if hidden is not None:
            return _row_sums(hidden[:, -labels.shape[1] : -1], head, labels[:, 1:], ignored)
    _refused[model] = reason
    log.info("loss   from the model's own logits: %s", reason)
    return None


def refusal(model: nn.Module) -> str | None:
    """Why `row_losses` left the loss to the model's own logits; None if it did not, or was not asked yet."""
    return _refused.get(model)


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """(n,) losses in float32 for hidden (n, D), weight (V, D), bias (V,), labels (n,).

    The gradient for `hidden` is made with the loss, chunk by chunk, and (n, D) is all that is retained.
    """
    return _ChunkedCrossEntropy.apply(hidden, weight, bias, labels)


class _ChunkedCrossEntropy(TensorFunction):
    @staticmethod
    def forward(ctx: Context, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        losses = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for here in _slices(len(hidden), max(1, _CHUNK // len(weight))):
            logits = _logits(hidden[here], weight, bias, wide)
            _chunk(logits, labels[here], losses[here], weight, None if grad is None else grad[here])
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @first_derivative_only("take the loss from the model's own logits")
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return None if grad is None else grad * grads[0].unsqueeze(1).to(grad.dtype), None, None, None


def _slices(n: int, most: int) -> Iterator[slice]:
    """0…n in as few slices as there must be of up to `most`, all about as long."""
    pieces = -(-n // most)
    return (slice(n * i // pieces, n * (i + 1) // pieces) for i in range(pieces))


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, wide: torch.dtype) -> Tensor:
    """(c, V) in `wide`, which products are made in too where that is faster than in 16 bits."""
    is_wide = runs_wide(weight.dtype, hidden.device.type, len(hidden))
    logits = times_transposed(hidden.to(wide) if is_wide else hidden, weight).to(wide)
    return logits if bias is None else logits.add_(bias)


def _chunk(logits: Tensor, labels: Tensor, losses: Tensor, weight: Tensor, grad: Tensor | None) -> None:
    """Fill `losses` (c,) and, if asked, `grad` (c, D); `logits` (c, V) is used up."""
    right = labels.unsqueeze(1)
    highest = logits.amax(1, keepdim=True)
    chosen = logits.gather(1, right).sub_(highest)
    total = logits.sub_(highest).exp_().sum(1, keepdim=True)
    torch.sub(total.log(), chosen, out=losses.unsqueeze(1))
    if grad is not None:
        logits.div_(total).scatter_add_(1, right, torch.full_like(total, -1.0))
        grad.copy_(wide_product(logits, weight))


def _row_sums(hidden: Tensor, head: nn.Linear, labels: Tensor, ignored: int) -> Tensor:
    """(B,) from hidden (B, T-1, D) and labels (B, T-1)."""
    device = hidden.device.type
    dtype = autocast_dtype(device)
    if hidden.dtype != torch.float64 and dtype is not None:
        hidden = hidden.to(dtype)
    weight, bias = head.weight.to(hidden.dtype), None if head.bias is None else head.bias.to(hidden.dtype)
    sums = _sums_of_used if device in ("cpu", "meta") else _sums_of_all
    with without_autocast(device):
        return sums(hidden, weight, bias, labels, labels != ignored)


def _sums_of_used(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, used: Tensor) -> Tensor:
    """(B,); labels that are not used never meet the vocabulary."""
    losses = chunked_cross_entropy(hidden[used], weight, bias, labels[used])
    rows = torch.arange(len(labels), device=labels.device).unsqueeze(1).expand_as(labels)[used]
    return torch.zeros(len(labels), dtype=losses.dtype, device=losses.device).index_add(0, rows, losses)


def _sums_of_all(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, used: Tensor) -> Tensor:
    """(B,) the same where the number of used labels would have to be waited for: nothing is copied from a GPU."""
    known = labels.masked_fill(~used, 0).flatten()
    losses = chunked_cross_entropy(hidden.flatten(0, 1), weight, bias, known)
    return losses.view(labels.shape).masked_fill(~used, 0).sum(1)


def _plain_head(model: nn.Module) -> tuple[nn.Linear | None, str]:
    """The frozen nn.Linear that makes the logits, or why there is none to work with."""
    find = getattr(model, "get_output_embeddings", None)
    head = find() if callable(find) else None
    if head is None:
        return None, f"{type(model).__name__} names no output head"
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None, f"its head is an adapted or special {type(head).__name__}"
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None, "its head is trained"
    if head._forward_hooks or head._forward_pre_hooks:
        return None, "its head has hooks"
    return head, ""


class _Caught(nn.Module):
    """Stands for the head during one forward pass and lets the hidden states through."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = head.weight, head.bias  # for models that ask for its dtype or device
        self.seen: list[tuple[Tensor, int]] = []

    def forward(self, hidden: Tensor) -> Tensor:
        self.seen.append((hidden, hidden._version))
        return hidden


def _hidden(model: nn.Module, inputs: Mapping[str, Tensor], head: nn.Linear) -> tuple[Tensor | None, str]:
    """(B, T, D) what the model hands to its head, virtual tokens before a row included. Refused unless it returns the
    head's output as it is: a scaled or capped logit would be another tensor."""
    caught = _Caught(head)
    with _replaced(model, head, caught):
        logits = model(**inputs).logits
    if len(caught.seen) != 1:
        return None, f"it calls its head {len(caught.seen)} times"
    hidden, version = caught.seen[0]
    if logits is not hidden or logits._version != version:
        return None, "it changes the logits after its head"
    return hidden, ""


@contextmanager
def _replaced(model: nn.Module, head: nn.Module, other: nn.Module) -> Iterator[None]:
    owners = [(m, key) for m in model.modules() for key, child in m._modules.items() if child is head]
    try:
        for owner, key in owners:
            owner._modules[key] = other
        yield
    finally:
        for owner, key in owners:
            owner._modules[key] = head
