"""Whether a model and its adapters answer together as they would one by one, looked at before anything is served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_exp.adapters import BASE
from lora_exp.errors import UserError
from lora_exp.use.serving.batch import Batch

if TYPE_CHECKING:
    from lora_exp.use.loading import Trained

_SHORT, _LONG = [1, 2, 3], [4, 3, 2, 1, 2, 3, 4]  # tokens that every vocabulary has
_TOLERANCE = 1e-3  # of the largest logit; roundings in float32 are a hundredth of it


def check_batches(trained: Trained, size: int) -> None:
    """Raise UserError for a model that cannot be written on with, or that sees the padding of its neighbours."""
    label, names = trained.config.model.label, [BASE, BASE]
    if not getattr(trained.model, "can_generate", lambda: False)():
        raise UserError(f"model={label} writes no text: task=serve is for causal language models")
    try:
        alone = _logits(trained, [_SHORT], names[:1])
        if size == 1:
            return
        together = _logits(trained, [_SHORT, _LONG], names)
    except (TypeError, AttributeError, ValueError, IndexError, RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"model={label} cannot be written on with from keys and values ({type(error).__name__}: {error}): "
            "use task=generate, or export it for another server"
        ) from error
    if not _agree(trained, alone[0], together[0]):
        raise UserError(f"model={label} answers otherwise beside a longer prompt: use serve.batch=1")


def check_routes(trained: Trained, key: str) -> None:
    """Raise UserError for an adapter that cannot run beside others in one batch."""
    said = f"{trained.runs[key].title} cannot be served beside other adapters"
    try:
        together = _logits(trained, [_SHORT, _SHORT], [key, BASE])
    except UserError as error:
        raise UserError(f"{said} ({error}): use task=generate, or export it") from error
    alone = _logits(trained, [_SHORT], [key])
    if not _agree(trained, alone[0], together[0]):
        raise UserError(f"{said}: it answers otherwise beside the base. Use task=generate, or export it")


def _logits(trained: Trained, prompts: list[list[int]], names: list[str]) -> Tensor:
    """(B, 2 V) of the next tokens, and of those after one more, in the order of ``prompts``."""
    batch = Batch(trained)
    first, order = batch.join(prompts, names)
    second = batch.step([1] * len(prompts))
    back = sorted(range(len(order)), key=lambda index: order[index])
    return torch.cat([first, second[back]], 1)


def _agree(trained: Trained, one: Tensor, other: Tensor) -> bool:
    """In float32; what is rounded to fewer bits may differ by how many rows there are."""
    if trained.place.dtype != torch.float32 or trained.place.autocast or trained.config.quantization.name != "none":
        return True
    return bool((one - other).abs().max() <= _TOLERANCE * one.abs().max().clamp_min(1e-3))
