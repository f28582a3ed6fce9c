"""Optimizer and learning-rate schedule of a lane."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from lora_exp.config import OptimizerConfig, TrainConfig
from lora_exp.errors import UserError

log = logging.getLogger(__name__)


def build_optimizer(
    parameters: Iterable[nn.Parameter], section: OptimizerConfig, fast: Mapping[str, nn.Parameter] | None = None
) -> torch.optim.Optimizer:
    """AdamW over one lane's parameters; by bitsandbytes with states in 8 bits (tensors below 4096 values: in 32).

    ``fast``: those of them, by name, whose learning rate is ``lora_plus_ratio`` times as high.
    """
    parameters = list(parameters)
    build: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW
    if section.name != "adamw":
        build = _eight_bit(section.name, parameters[0].device)
    betas = (section.betas[0], section.betas[1])
    groups = _groups(parameters, section, fast or {})
    return build(groups, lr=section.lr, betas=betas, eps=section.eps, weight_decay=section.weight_decay)


def _groups(
    parameters: list[nn.Parameter], section: OptimizerConfig, fast: Mapping[str, nn.Parameter]
) -> list[dict[str, object]]:
    """One group, or LoRA+'s (arXiv:2402.12354): A, then B and vectors, then biases, which PEFT decays no more."""
    if section.lora_plus_ratio is None:
        return [{"params": parameters}]
    if not fast:
        raise UserError(
            f"optimizer.lora_plus_ratio={section.lora_plus_ratio} is for a factor B of linear layers or convolutions, "
            "and this adapter has none: leave it out"
        )
    known, rate = {id(parameter) for parameter in fast.values()}, section.lr * section.lora_plus_ratio
    biases = [parameter for name, parameter in fast.items() if "bias" in name]
    groups: list[dict[str, object]] = [
        {"params": [parameter for parameter in parameters if id(parameter) not in known]},
        {"params": [parameter for name, parameter in fast.items() if "bias" not in name], "lr": rate},
        {"params": biases, "lr": rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _eight_bit(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    from bitsandbytes.optim import adamw as optim

    if device.type not in ("cuda", "cpu"):
        raise UserError(f"optimizer={name} is not on device={device.type}: use optimizer=adamw")
    if name == "paged_adamw_8bit" and device.type == "cuda":
        return optim.PagedAdamW8bit
    if name == "paged_adamw_8bit":
        log.info(f"optimizer=paged_adamw_8bit: device={device.type} has no memory to page out of, so as adamw_8bit")
    return optim.AdamW8bit


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
