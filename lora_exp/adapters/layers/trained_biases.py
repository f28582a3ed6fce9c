"""Biases that an adapter trains (`bias="all"` or "lora_only"), one set an adapter; the base's own stay.

The owner of a bias gets a child `trained_biases` and a hook that adds what the adapter changed. So
several adapters can train the same bias in one batch, and disabling them gives back exactly the base.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lora_exp.adapters.config import LoraConfig
from lora_exp.adapters.layers.registry import layer_class_for
from lora_exp.adapters.routing.route import Route
from lora_exp.errors import UserError

CHILD = "trained_biases"


class TrainedBiases(nn.Module):
    """One module's trained biases by adapter name, each (out,)."""

    def __init__(self, route: Route, axis: int) -> None:
        super().__init__()
        self.route = route
        self.axis = axis
        self.values = nn.ParameterDict()
        self.kept: dict[str, nn.Parameter] = {}  # the base's bias while one of ours is merged in

    @property
    def is_merged(self) -> bool:
        return len(self.kept) > 0  # see LoRALayerBase.is_merged

    def apply_to(self, out: Tensor, base: Tensor) -> Tensor:
        plan = self.route.plan()
        if self.is_merged or not any(name in self.values for name in plan.names):
            return out
        out, spans = plan.read(out)
        parts = [self._changed(name, out if rows is None else out[rows], base) for name, rows in spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _changed(self, name: str, out: Tensor, base: Tensor) -> Tensor:
        if name not in self.values:
            return out
        change: Tensor = (self.values[name] - base).to(out.dtype)
        trailing = (out.dim() - self.axis if self.axis >= 0 else -self.axis) - 1
        return out + change.view(-1, *[1] * trailing)


def add_biases(owners: list[tuple[str, nn.Module, int]], name: str, route: Route) -> None:
    """Give adapter `name` its own copy of every owner's bias; a bias that two share stays shared."""
    copies: dict[int, nn.Parameter] = {}
    for _, module, axis in owners:
        if (trained := module._modules.get(CHILD)) is None:
            trained = TrainedBiases(route, axis)
            module.add_module(CHILD, trained)
            module.register_forward_hook(_add_change)
        assert isinstance(trained, TrainedBiases)
        base = module.bias
        assert isinstance(base, nn.Parameter)
        trained.values[name] = copies.setdefault(id(base), _trainable_copy(base))


def trained_owners(
    modules: dict[str, nn.Module], adapted: set[str], config: LoraConfig
) -> list[tuple[str, nn.Module, int]]:
    """(name, module, channel axis) of every module whose bias `config` trains; all checks happen here."""
    if config.bias == "none":
        return []
    wanted = adapted if config.bias == "lora_only" else set(modules)
    owners = [(name, m) for name, m in modules.items() if name in wanted and _has_bias(m)]
    known = [(name, m, axis) for name, m in owners if (axis := _bias_axis(modules, name)) is not None]
    covered = {id(m.bias) for _, m, _ in known}
    for name, module in owners:
        if id(module.bias) not in covered:
            raise UserError(
                f"bias={config.bias!r}: the bias of {name} ({type(module).__name__}) is not simply added to "
                "that module's output, so it cannot be trained by adapter; use bias='lora_only' or 'none'"
            )
    if not known:
        raise UserError(f"bias={config.bias!r} finds no bias to train in this model; use bias='none'")
    return known


def remove_biases(module: nn.Module) -> None:
    """Take the child and the hook off again."""
    del module._modules[CHILD]
    for key in [key for key, hook in module._forward_hooks.items() if hook is _add_change]:
        del module._forward_hooks[key]


def _add_change(module: nn.Module, args: object, out: Tensor) -> Tensor:
    trained, base = module._modules[CHILD], module.bias
    assert isinstance(trained, TrainedBiases)
    assert isinstance(base, Tensor)
    return trained.apply_to(out, base)


def _trainable_copy(bias: Tensor) -> nn.Parameter:
    dtype = torch.float64 if bias.dtype == torch.float64 else torch.float32
    return nn.Parameter(bias.detach().to(dtype, copy=True))


def _has_bias(module: nn.Module) -> bool:
    return isinstance(module._parameters.get("bias"), nn.Parameter)


def _bias_axis(modules: dict[str, nn.Module], name: str) -> int | None:
    """The output dimension along which a module adds its bias; None if it does something else with it."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0]) if name else None
    if isinstance(parent, nn.MultiheadAttention) and parent is not module:
        return None  # read without calling the layer
    if isinstance(module, nn.modules.conv._ConvNd):
        return -len(module.kernel_size) - 1
    if isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm)):
        return 1
    kind = layer_class_for(module)
    is_linear = kind is not None and kind.layer_type == "linear"
    return -1 if is_linear or isinstance(module, (nn.LayerNorm, nn.Bilinear)) else None
