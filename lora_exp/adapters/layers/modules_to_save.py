"""`modules_to_save`: modules that an adapter trains in full, one copy an adapter, beside the original."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from lora_exp.adapters.layers.adapted import strip
from lora_exp.adapters.layers.trained_biases import CHILD, remove_biases
from lora_exp.adapters.routing.plan import Plan
from lora_exp.adapters.routing.route import Route
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.layers.adapted import LoRALayerBase

_Inputs = tuple[object, ...]
_Named = dict[str, object]
_HALVES = (torch.float16, torch.bfloat16)


def add_copies(model: nn.Module, names: list[str], name: str, route: Route) -> None:
    """Give adapter `name` a trainable copy of each named module."""
    for module_name in names:
        parent = model.get_submodule(module_name.rpartition(".")[0])
        child_name = module_name.rpartition(".")[2]
        child = parent._modules[child_name]
        assert child is not None
        if not isinstance(child, SavedModule):
            child = SavedModule(child, route)
            parent._modules[child_name] = child
        child.copies[name] = _trainable_copy(child.original)


class SavedModule(nn.Module):
    """Runs the original, or the copy of whichever adapter serves the batch or a slice of it."""

    def __init__(self, original: nn.Module, route: Route) -> None:
        super().__init__()
        self.original = original
        self.copies = nn.ModuleDict()
        self.route = route

    def forward(self, *args: object, **kwargs: object) -> object:
        plan = self.route.plan()
        if not any(name in self.copies for name in plan.names):
            return self.original(*args, **kwargs)
        if plan.sizes is None:
            return self._run(plan.names[0], args, kwargs)
        spans = plan.split(_batch_length(plan, args, kwargs))
        return _concatenated([self._part(name, *_sliced(args, kwargs, a, b, spans[-1][2])) for name, a, b in spans])

    def __getattr__(self, name: str) -> Tensor | nn.Module:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("original", "copies"):
                raise
            return self._read(name)

    def _read(self, attribute: str) -> Tensor | nn.Module:
        """Of the copy that serves the whole batch, for a parent that reads weights instead of calling."""
        names = self.route.plan().names
        chosen = self.copies[names[0]] if len(names) == 1 and names[0] in self.copies else self.original
        value: Tensor | nn.Module = getattr(chosen, attribute)
        if isinstance(value, Tensor) and len(names) > 1 and any(name in self.copies for name in names):
            raise UserError(
                f"{attribute} of a saved module is read without calling the module, so no slice of the batch can get a "
                f"copy of its own ({', '.join(names)}); save the module that reads it, or run one adapter at a time"
            )
        return value

    def _part(self, name: str, args: _Inputs, kwargs: _Named) -> object:
        """What is inside of the original (another adapter's factors or biases) sees one adapter's slice alone."""
        with self.route.using(Plan((name,))):
            return self._run(name, args, kwargs)

    def _run(self, name: str, args: _Inputs, kwargs: _Named) -> object:
        """The copy computes in its own float32 where the base is half precision."""
        if name not in self.copies:
            return self.original(*args, **kwargs)
        half = next((p.dtype for p in self.original.parameters() if p.dtype in _HALVES), None)
        if half is None:
            return self.copies[name](*args, **kwargs)
        wide = [_cast(value, torch.float32) for value in args]
        out = self.copies[name](*wide, **{key: _cast(value, torch.float32) for key, value in kwargs.items()})
        return _cast(out, half)


def _trainable_copy(module: nn.Module) -> nn.Module:
    twin = copy.deepcopy(module)
    for inner in list(twin.modules()):  # what other adapters have in the original is theirs
        if CHILD in inner._modules:
            remove_biases(inner)
        if hasattr(inner, "own_attributes"):
            strip(cast("LoRALayerBase", inner))
    for parameter in twin.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)
    return twin.float() if any(p.dtype in _HALVES for p in twin.parameters()) else twin


def _cast(value: object, dtype: torch.dtype) -> object:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _tensors(args: _Inputs, kwargs: _Named) -> Iterator[Tensor]:
    return (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0)


def _batch_length(plan: Plan, args: _Inputs, kwargs: _Named) -> int:
    first = next(_tensors(args, kwargs), None)
    if first is None:
        raise UserError("a saved module was called without a tensor, so its batch cannot be routed")
    return first.shape[0]


def _sliced(args: _Inputs, kwargs: _Named, start: int, stop: int, length: int) -> tuple[_Inputs, _Named]:
    def cut(value: object) -> object:
        if isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == length:
            return value[start:stop]
        return value

    return tuple(cut(value) for value in args), {key: cut(value) for key, value in kwargs.items()}


def _concatenated(parts: list[object]) -> object:
    if isinstance(parts[0], Tensor):
        return torch.cat(cast("list[Tensor]", parts))
    if isinstance(parts[0], tuple):
        return tuple(_concatenated(list(items)) for items in zip(*cast("list[_Inputs]", parts), strict=True))
    raise UserError(f"a saved module that returns {type(parts[0]).__name__} cannot be routed; save an inner one")
