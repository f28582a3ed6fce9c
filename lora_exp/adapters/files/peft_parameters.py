"""PEFT's `target_parameters` (0.21): which stacks of weights they mean, and under which names PEFT keeps their factors.

PEFT wraps a module once for each of its parameters, one wrapper around the other in the parameters' order, so the last
one's factors have the module's own name, the one before is inside of it, and so on.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from torch import nn

from lora_exp.adapters.inspection.traversal import joined
from lora_exp.adapters.layers.registry import parts_of
from lora_exp.adapters.surgery.left_out import is_stack
from lora_exp.errors import UserError

_Modules = Mapping[str, nn.Module]


def layers_alone(modules: _Modules) -> dict[str, nn.Module]:
    """`modules` without those that stand for a parameter, of which PEFT knows nothing."""
    return {name: module for name, module in modules.items() if not is_stack(module)}


def named_stacks(wish: object, modules: _Modules, source: str) -> set[str]:
    """The stacks that `target_parameters` mean; other parameters are refused."""
    if not wish:
        return set()
    if not isinstance(wish, list) or not all(isinstance(entry, str) for entry in wish):
        raise UserError(f"{source}: target_parameters={wish!r} must be a list of names; copy the adapter anew")
    found = _matched(wish, modules)
    if others := sorted(name for name in found if name not in modules or not is_stack(modules[name])):
        raise UserError(
            f"{source}: target_parameters name {others[0]}, which is no stack of expert weights; such a parameter is "
            "adapted as a layer here, so load this adapter with PEFT"
        )
    return found


def shortest_targets(stacks: Collection[str], modules: _Modules) -> list[str] | None:
    """`target_parameters` that mean these stacks: last names if they mean no other parameter, else full names."""
    endings = sorted({name.rpartition(".")[2] for name in stacks})
    return (endings if _matched(endings, modules) == set(stacks) else sorted(stacks)) or None


def stacked_weights(stack: nn.Module) -> int:
    """How many there are."""
    return len(stack.get_parameter("weight"))


def peft_names(stacks: Collection[str], modules: _Modules) -> dict[str, str]:
    """{the name under which PEFT keeps the factors: ours}, where these stacks are adapted together."""
    found: dict[str, str] = {}
    for name, module in modules.items():
        keys = [key for key in parts_of(module) if joined(name, key) in stacks]
        for depth, key in enumerate(reversed(keys)):
            found[joined(name, *["base_layer"] * depth)] = joined(name, key)
    return found


def _matched(wish: Iterable[str], modules: _Modules) -> set[str]:
    """The parameters whose name is one of `wish`, or ends with a dot and it."""
    endings = tuple(f".{entry}" for entry in wish)
    names = [joined(name, key) for name, module in modules.items() for key in module._parameters]
    return {name for name in names if f".{name}".endswith(endings)}
