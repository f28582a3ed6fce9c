"""``parallel``: what of a training several processes share out, and what it cannot be combined with."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from lora_exp.config import Config
from lora_exp.machine import launch

if TYPE_CHECKING:
    from lora_exp.backends import Adapted
    from lora_exp.machine.distributed import World
    from lora_exp.machine.place import Place

log = logging.getLogger(__name__)
CHOICES = ("auto", "ddp", "fsdp")


def problems(config: Config, is_parallel: bool) -> list[str]:
    """What can be seen to be wrong before anything is loaded. ``is_parallel``: the trainer can share its work."""
    if config.parallel not in CHOICES:
        return [f"parallel={config.parallel} is not known: choose one of {', '.join(CHOICES)}"]
    if config.task != "train":
        return []
    launched = launch.is_launched()
    if not launched and config.parallel != "auto":
        command = "torchrun --nproc_per_node 2 -m lora_exp"
        return [f"parallel={config.parallel} is for several processes, and this is one: start them by {command} …"]
    if not launched:
        return []
    found = [] if is_parallel else [f"trainer={config.trainer} trains in one process here: use trainer=native"]
    found += _accelerate_problems(config)
    return found + (_fsdp_problems(config) if config.parallel == "fsdp" else [])


def _accelerate_problems(config: Config) -> list[str]:
    """What ``accelerate launch`` was told beside the number of processes: here the config says it."""
    told = {name: os.environ.get(f"ACCELERATE_{name}", "").lower() for name in ("USE_FSDP", "MIXED_PRECISION")}
    found = []
    if told["USE_FSDP"] == "true" and config.parallel != "fsdp":
        found.append(f"accelerate was told to use FSDP, and parallel={config.parallel}: give parallel=fsdp")
    if (precision := told["MIXED_PRECISION"]) not in ("", "no"):
        found.append(f"accelerate was told mixed_precision={precision}: leave it at no, and give model.dtype")
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        found.append("accelerate was told to use DeepSpeed, which this cannot: give parallel=fsdp, without it")
    return found


def _fsdp_problems(config: Config) -> list[str]:
    found, instead = [], "use parallel=ddp"
    if config.quantization.name != "none":
        packed = "packed weights, which with their constants cannot be cut up"
        found.append(f"parallel=fsdp cannot share out quantization={config.quantization.name}'s {packed}: {instead}")
    if config.adapter.trains == "weights":
        found.append(
            f"parallel=fsdp shares out what is frozen, and adapter={config.adapter.name} trains weights of the base: "
            f"{instead}"
        )
    if config.backend == "peft":
        found.append(
            f"parallel=fsdp leaves PEFT unable to save, which looks at the base for it: {instead}, or backend=native"
        )
    if config.plan.strict:
        found.append("plan.strict=true plans for one process, and parallel=fsdp shares the base out: leave it out")
    return found


def loading_place(config: Config, place: Place) -> Place:
    """Where a base is loaded to: one that is shared out need not fit into one process's device."""
    import torch

    return replace(place, device=torch.device("cpu")) if config.parallel == "fsdp" else place


def spread(adapted: Adapted, config: Config, place: Place, world: World) -> None:
    """Share the base out, if that is wanted; then let all start from the same values and each draw its own numbers."""
    if world.size == 1:
        return
    from lora_exp.adapters.numerics.dropout import distinct_seed
    from lora_exp.machine.place import set_seed

    if config.parallel == "fsdp":
        from lora_exp.machine.sharding import shard

        if world.leads and callable(identify := getattr(adapted.model, "base_sha256", None)):
            identify()  # kept for the adapter's files, as a share tells nobody what the base was
        shard(adapted.model, adapted.parameters, world, place.device)
    world.lead_values(adapted.parameters)
    set_seed(distinct_seed(config.seed) % 2**32)  # the base's own dropout must not drop the same in all
    micro, steps = config.train.micro_batch_size, config.train.grad_accum_steps
    log.info(f"{world.size} processes ({_name(config)}): {micro} × {steps} × {world.size} rows an optimizer step")


def world_tags(config: Config, world: World) -> dict[str, str]:
    """What a run is recorded with: a micro batch is a process's own, and the others' are of the same step."""
    if world.size == 1:
        return {}
    rows = config.train.micro_batch_size * config.train.grad_accum_steps * world.size
    return {"processes": str(world.size), "parallel": _name(config), "rows_per_step": str(rows)}


def _name(config: Config) -> str:
    return "ddp" if config.parallel == "auto" else config.parallel
