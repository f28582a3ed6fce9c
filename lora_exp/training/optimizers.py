"""Optimizer and learning-rate schedule of a lane."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_exp.config import OptimizerConfig, TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], section: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over one lane's parameters."""
    betas = (section.betas[0], section.betas[1])
    return torch.optim.AdamW(parameters, lr=section.lr, betas=betas, eps=section.eps, weight_decay=section.weight_decay)


def build_schedule(optimizer: torch.optim.Optimizer, section: TrainConfig) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then cosine, linear or no decay to 0 at ``steps``.

    The factors are those of transformers' ``get_*_schedule_with_warmup``.
    """
    warmup, steps = section.warmup_steps, section.steps

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        progress = (step - warmup) / max(1, steps - warmup)
        if section.schedule == "cosine":
            return max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return max(0.0, 1 - progress) if section.schedule == "linear" else 1.0

    return LambdaLR(optimizer, factor)
