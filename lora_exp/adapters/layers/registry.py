"""Which of our classes adapts which base class.

Known by qualified name, so that a layer of a library that is not loaded needs no import: one file that
says `@adapts("bitsandbytes.nn.modules.Linear4bit")` adds a kind of layer.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from torch import nn

from lora_exp.adapters.host import Host
from lora_exp.errors import UserError
from lora_exp.registry import import_all

PARTS = "adapted_parameters"  # the child of a module under which adapted parts of it are

_Parts = Callable[[nn.Module], Mapping[str, nn.Module]]
_LAYERS: dict[str, type[Host]] = {}
_PARTS: list[_Parts] = []
_MADE: dict[tuple[type, type], type[nn.Module]] = {}
_Layer = TypeVar("_Layer", bound="type[Host]")
_Made = TypeVar("_Made", bound=nn.Module)


def adapts(*base_names: str) -> Callable[[_Layer], _Layer]:
    """Class decorator: this class adapts the base classes of these qualified names and their subclasses."""

    def register(layer_class: _Layer) -> _Layer:
        _LAYERS.update(dict.fromkeys(base_names, layer_class))
        return layer_class

    return register


def divides(find: _Parts) -> _Parts:
    """Decorator of a function that finds the parts of a module, see `parts_of`."""
    _PARTS.append(find)
    return find


def parts_of(module: nn.Module) -> dict[str, nn.Module]:
    """Layers that stand for single parameters of `module`, by the parameter's key; none for most modules.

    A module that has several weights is adapted weight by weight. Its parts are its children wherever the library
    looks for layers; torch sees only the adapted ones, under `PARTS`.
    """
    import_all("lora_exp.adapters.layers")
    return {key: part for find in _PARTS for key, part in find(module).items()}


def layer_class_for(module: nn.Module) -> type[Host] | None:
    """Our class for a module, by its nearest registered base class."""
    import_all("lora_exp.adapters.layers")
    for base in type(module).__mro__:
        if (found := _LAYERS.get(qualified_name(base))) is not None:
            return found
    return None


def layer_types(wished: Sequence[str]) -> frozenset[str]:
    """The types meant, all for "all". Raises UserError for one that no kind of layer has."""
    import_all("lora_exp.adapters.layers")
    known = {kind.layer_type for kind in _LAYERS.values()}
    if tuple(wished) == ("all",):
        return frozenset(known)
    if unknown := [kind for kind in wished if kind not in known]:
        raise UserError(
            f"layer_types: {unknown[0]!r} is no layer type; choose from {', '.join(sorted(known))}, or 'all' alone"
        )
    return frozenset(wished)


def adapted_class(layer_class: type[_Made], base_class: type[nn.Module]) -> type[_Made]:
    """`layer_class` itself if it adapts exactly `base_class`, else a subclass of both, made once."""
    if base_class in layer_class.__mro__:
        return layer_class
    if (made := _MADE.get((layer_class, base_class))) is not None:
        return made  # type: ignore[return-value]
    members = {"__module__": __name__, "made_from": (layer_class, base_class)}
    made = type(f"LoRA{base_class.__name__}", (layer_class, base_class), members)
    return _MADE.setdefault((layer_class, base_class), made)  # type: ignore[return-value]


def restore(layer_class: type[_Made], base_class: type[nn.Module]) -> _Made:
    """An empty layer of a class that was made on the fly, for pickle and deepcopy to fill."""
    made = adapted_class(layer_class, base_class)
    return made.__new__(made)


def rebind(module: nn.Module) -> None:
    """accelerate keeps the bound forward of a module that it has hooked; point it to the one of its class now."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = types.MethodType(type(module).forward, module)


def base_class_of(layer: Host) -> type[nn.Module]:
    """The torch class that a layer adapts."""
    if layer.made_from is not None:
        return layer.made_from[1]
    return next(kind for kind in type(layer).__mro__ if qualified_name(kind) in _LAYERS)


def forward_override(module: nn.Module) -> type | None:
    """The class between a module's own and its registered base that changes forward; None if none does."""
    for kind in type(module).__mro__:
        if qualified_name(kind) in _LAYERS:
            return None
        if "forward" in vars(kind) and not hasattr(kind, "made_from"):
            return kind
    return None


def qualified_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
