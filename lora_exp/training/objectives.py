"""What is minimised, a row at a time, so that rows of one batch can belong to different lanes.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.training.loss_head import row_losses

Batch = Mapping[str, Tensor]
IGNORED = -100


@dataclass(frozen=True)
class RowLosses:
    """``total`` (B,): the sum of a row's losses in nats. ``count`` (B,): how many predictions it holds.

    ``hits`` (B,): how many of them are right, where the objective counts that.
    """

    total: Tensor
    count: Tensor
    hits: Tensor | None = None


@dataclass(frozen=True)
class Sums:
    """The rows' losses, predictions and hits of a whole evaluation."""

    loss: float = 0.0
    count: int = 0
    hits: int = 0

    def plus(self, rows: RowLosses) -> Sums:
        hits = 0 if rows.hits is None else int(rows.hits.sum().item())
        return Sums(
            self.loss + rows.total.double().sum().item(), self.count + int(rows.count.sum().item()), self.hits + hits
        )


Metric = Callable[[Sums], float]


@dataclass(frozen=True)
class Objective:
    """What a kind of data is learnt by: how rows become a batch, a batch losses, and an evaluation figures.

    ``count`` tells a batch's predictions a row, (B,), before the pass. ``metrics`` by name, ``loss`` among
    them. ``unit``: what ``labels`` holds, for the speed of training.
    """

    losses: Callable[[nn.Module, Batch], RowLosses]
    count: Callable[[Batch], Tensor]
    collate: Callable[[list[dict[str, Tensor]]], Batch]
    metrics: Mapping[str, Metric]
    unit: str


def mean_loss(sums: Sums) -> float:
    """Nats a prediction; of none nan, which no comparison takes for the best."""
    return sums.loss / sums.count if sums.count else math.nan


def perplexity(sums: Sums) -> float:
    """e to the mean loss; above e^709 a float overflows."""
    return math.exp(min(mean_loss(sums), 700.0))


def accuracy(sums: Sums) -> float:
    """The share of predictions that are right; of none nan."""
    return sums.hits / sums.count if sums.count else math.nan


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


def image_losses(model: nn.Module, batch: Batch) -> RowLosses:
    """Cross-entropy of ``pixels`` (B, 3, S, S) against classes ``labels`` (B,), in float32."""
    labels = batch["labels"]
    logits = model(batch["pixels"]).float()  # (B, classes)
    losses = F.cross_entropy(logits, labels, reduction="none")
    return RowLosses(losses, count_images(batch), hits=(logits.argmax(1) == labels).long())


def count_images(batch: Batch) -> Tensor:
    """One prediction an image, (B,)."""
    return torch.ones_like(batch["labels"])


def collate_images(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Images of C = 1 or 3 channels, uint8 (C, S, S) → ``pixels`` (B, 3, S, S) in [0, 1] and ``labels`` (B,)."""
    pixels = torch.stack([row["pixels"] for row in rows]).expand(-1, 3, -1, -1)
    return {"pixels": pixels.float() / 255, "labels": torch.stack([row["labels"] for row in rows]).long()}


CAUSAL_LM_METRICS: Mapping[str, Metric] = {"loss": mean_loss, "perplexity": perplexity}
CLASSIFICATION_METRICS: Mapping[str, Metric] = {"loss": mean_loss, "accuracy": accuracy}
# By kind of data.
OBJECTIVES = {
    "text": Objective(causal_lm_losses, count_predictions, collate_blocks, CAUSAL_LM_METRICS, "tokens"),
    "images": Objective(image_losses, count_images, collate_images, CLASSIFICATION_METRICS, "images"),
}
