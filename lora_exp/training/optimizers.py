"""A lane's optimizer, and what scales its gradients."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from lora_exp.config import OptimizerConfig
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.machine.place import Place

log = logging.getLogger(__name__)


def build_optimizer(
    parameters: Iterable[nn.Parameter],
    section: OptimizerConfig,
    fast: Mapping[str, nn.Parameter] | None = None,
    plain: Collection[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """AdamW over one lane's parameters; by bitsandbytes with states in 8 bits (tensors below 4096 values: in 32).

    ``fast``: those of them, by name, whose learning rate is ``lora_plus_ratio`` times as high. ``plain``: those that
    do not decay, biases and norms.
    """
    parameters = list(parameters)
    build: Callable[..., torch.optim.Optimizer] = functools.partial(torch.optim.AdamW, fused=_fuses(parameters))
    if section.name != "adamw":
        build = _eight_bit(section.name, parameters[0].device)
    betas = (section.betas[0], section.betas[1])
    groups = [part for group in _groups(parameters, section, fast or {}) for part in _by_decay(group, plain, section)]
    return build(groups, lr=section.lr, betas=betas, eps=section.eps, weight_decay=section.weight_decay)


def _fuses(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether one kernel may make the whole update: it takes values, gradients and states in the order of memory."""
    devices = {parameter.device.type for parameter in parameters}
    return devices <= {"cpu", "cuda"} and all(
        parameter.is_floating_point() and parameter.is_contiguous() for parameter in parameters
    )


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


def _by_decay(
    group: dict[str, object], plain: Collection[nn.Parameter], section: OptimizerConfig
) -> list[dict[str, object]]:
    """The group in two where some of it decays and some does not."""
    parameters, exempt = cast("list[nn.Parameter]", group["params"]), {id(parameter) for parameter in plain}
    decayed = [parameter for parameter in parameters if id(parameter) not in exempt]
    if not section.weight_decay or len(decayed) == len(parameters):
        return [group]
    left = [parameter for parameter in parameters if id(parameter) in exempt]
    parts = [group | {"params": decayed}, group | {"params": left, "weight_decay": 0.0}]
    return [part for part in parts if part["params"]]


def _eight_bit(name: str, device: torch.device) -> Callable[..., torch.optim.Optimizer]:
    from bitsandbytes.optim import adamw as optim

    if device.type not in ("cuda", "cpu"):
        raise UserError(f"optimizer={name} is not on device={device.type}: use optimizer=adamw")
    if name == "paged_adamw_8bit" and device.type == "cuda":
        return optim.PagedAdamW8bit
    if name == "paged_adamw_8bit":
        log.info(f"optimizer=paged_adamw_8bit: device={device.type} has no memory to page out of, so as adamw_8bit")
    return optim.AdamW8bit


def undecayed(model: nn.Module) -> list[nn.Parameter]:
    """The biases and the norms' weights, which weight decay leaves alone as transformers' ``Trainer`` does."""
    return [
        parameter
        for place, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if "bias" in name or "norm" in f"{place.rpartition('.')[2]}.{type(module).__name__}".lower()
    ]


def gradient_scaler(place: Place) -> torch.amp.GradScaler | None:
    """Where products are in float16, whose smallest number gradients fall below: scaled up until they are applied."""
    computes_in = place.autocast or place.dtype
    return torch.amp.GradScaler(place.device.type) if computes_in == torch.float16 else None
