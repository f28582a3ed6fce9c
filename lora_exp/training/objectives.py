"""What is minimised, a row at a time, so that rows of one batch can belong to different lanes.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.training.loss_head import row_losses

Batch = Mapping[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class RowLosses:
    """``total`` (B,): the sum of a row's losses in nats. ``count`` (B,): how many predictions it holds."""

    total: Tensor
    count: Tensor


def causal_lm_losses(model: nn.Module, batch: Batch) -> RowLosses:
    """Next-token cross-entropy of ``input_ids`` (B, T) against ``labels`` (B, T), in float32.

    Without ever holding all logits where the model's head allows it.
    """
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    total = row_losses(model, inputs, batch["labels"], IGNORED)
    if total is not None:
        return RowLosses(total, count_predictions(batch))
    logits = model(**inputs).logits[:, :-1]  # (B, T-1, V)
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return RowLosses(losses.view(labels.shape).sum(1), count_predictions(batch))


def count_predictions(batch: Batch) -> Tensor:
    """How many tokens each row predicts, (B,): the first has nothing before it."""
    return (batch["labels"][:, 1:] != IGNORED).sum(1)


def collate_blocks(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of T tokens → ``input_ids`` and ``labels``, both (B, T) int64: every token is predicted."""
    tokens = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": tokens, "labels": tokens}
