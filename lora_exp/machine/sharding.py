"""FSDP2: each process holds its share of the frozen base, and all of what is trained.

A layer's weights are gathered before its forward pass, freed, gathered again before its backward pass and freed. Only
the base is shared out. What is trained is a hundredth of it, and whole in each process it is summed, clipped,
optimised, checkpointed and saved as without sharding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn

from lora_exp.errors import UserError
from lora_exp.machine.distributed import World

_VIEW = "FSDP2-wrapped module"  # returned a view: nothing here writes to a model's output


def shard(model: nn.Module, trained: Iterable[nn.Parameter], world: World, device: torch.device) -> None:
    """Share out the frozen parameters of ``model``, layer by layer, and move all of it to ``device``.

    Raises UserError for a model without a list of layers.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    warnings.filterwarnings("ignore", message=_VIEW)
    mesh, whole = init_device_mesh(device.type, (world.size,)), set(trained)
    layers = layer_list(model)
    if layers is None:
        kind = type(model).__name__
        raise UserError(
            f"parallel=fsdp shares out a transformer's layers, and {kind} has no list of them: use parallel=ddp"
        )
    for layer in layers:
        layer.to(device)  # one at a time: the whole base may be more than a device holds
        fully_shard(layer, mesh=mesh, ignored_params=_inside(layer, whole))
    model.to(device)
    fully_shard(model, mesh=mesh, ignored_params=_inside(model, whole))


def layer_list(model: nn.Module) -> nn.ModuleList | None:
    """The list of a transformer's layers: of all lists of modules that with the most parameters. None without one."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    return max(lists, key=lambda layers: sum(parameter.numel() for parameter in layers.parameters()), default=None)


def _inside(module: nn.Module, parameters: set[nn.Parameter]) -> set[nn.Parameter]:
    return {parameter for parameter in module.parameters() if parameter in parameters}
