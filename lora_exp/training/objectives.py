"""What a language model learns by, a row at a time, so that rows of one batch can belong to different lanes.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.training.loss_head import row_losses
from lora_exp.training.metrics import RowLosses

Batch = Mapping[str, Tensor]
IGNORED = -100


def causal_lm_losses(model: nn.Module, batch: Batch) -> RowLosses:
    """Next-token cross-entropy of ``input_ids`` (B, T) against ``labels`` (B, T), in float32.

    Without ever holding all logits where the model's head allows it.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    total = row_losses(model, inputs, batch["labels"], IGNORED)
    if total is not None:
        return RowLosses(total, count_predictions(batch))
    return losses_from_logits(model, batch)


def losses_from_logits(model: nn.Module, batch: Batch) -> RowLosses:
    """The same from the model's own logits, all (B, T, V) of them."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    positions = batch["labels"].shape[1]  # before them virtual tokens may stand, which predict nothing
    logits = model(**inputs).logits[:, -positions:-1]  # (B, T-1, V)
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return RowLosses(losses.view(labels.shape).sum(1), count_predictions(batch))


def count_predictions(batch: Batch) -> Tensor:
    """How many tokens each row predicts, (B,): the first has nothing before it."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1)
