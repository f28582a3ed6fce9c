"""What a classifier learns by, a row at a time, and what its metrics are counted from.

Letters: B rows, K classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_exp.training.metrics import RowLosses


def class_losses(logits: Tensor, labels: Tensor) -> RowLosses:
    """Cross-entropy of ``logits`` (B, K) against classes ``labels`` (B,), in float32; one prediction a row."""
    logits = logits.float()
    predicted, kinds = logits.argmax(1), torch.arange(logits.shape[1], device=logits.device)
    said, given = predicted[:, None] == kinds, labels[:, None] == kinds  # (B, K)
    counted = {
        "hits": predicted == labels,
        "class_hits": said & given,
        "class_predicted": said,
        "class_labelled": given,
    }
    losses = F.cross_entropy(logits, labels, reduction="none")
    return RowLosses(losses, torch.ones_like(labels), counted)
