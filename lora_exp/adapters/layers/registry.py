"""Which of our classes adapts which base class.

Known by qualified name, so that a layer of a library that is not loaded needs no import: one file that
says `@adapts("bitsandbytes.nn.modules.Linear4bit")` adds a kind of layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from lora_exp.adapters.discovery import import_all
from lora_exp.adapters.host import Host
from lora_exp.errors import UserError

_LAYERS: dict[str, type[Host]] = {}
_MADE: dict[tuple[type, type], type[Host]] = {}
_Layer = TypeVar("_Layer", bound="type[Host]")


def adapts(*base_names: str) -> Callable[[_Layer], _Layer]:
    """Class decorator: this class adapts the base classes of these qualified names and their subclasses."""

    def register(layer_class: _Layer) -> _Layer:
        _LAYERS.update(dict.fromkeys(base_names, layer_class))
        return layer_class

    return register


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


def adapted_class(layer_class: type[Host], base_class: type[nn.Module]) -> type[Host]:
    """`layer_class` itself if it adapts exactly `base_class`, else a subclass of both, made once."""
    if base_class in layer_class.__mro__:
        return layer_class
    if (made := _MADE.get((layer_class, base_class))) is not None:
        return made
    members = {"__module__": __name__, "made_from": (layer_class, base_class)}
    made = type(f"LoRA{base_class.__name__}", (layer_class, base_class), members)
    return _MADE.setdefault((layer_class, base_class), made)


def restore(layer_class: type[Host], base_class: type[nn.Module]) -> Host:
    """An empty layer of a class that was made on the fly, for pickle and deepcopy to fill."""
    made = adapted_class(layer_class, base_class)
    return made.__new__(made)


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
