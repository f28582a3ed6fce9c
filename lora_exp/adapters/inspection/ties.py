"""Weights that a model uses in two places, such as an embedding that is also the output head, when only one of them
was adapted: they are two weights from then on, and whoever loads them has to know.

transformers' flag `tie_word_embeddings` rules all ties of a model at once, and ties again what a file holds once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from lora_exp.adapters.inspection.traversal import base_modules, joined, own_parameter

_FLAG = "tie_word_embeddings"


class _Config(Protocol):
    """transformers' PreTrainedConfig."""

    def to_dict(self) -> dict[str, object]: ...

    @classmethod
    def from_dict(cls, config_dict: dict[str, object]) -> _Config: ...


def weight_ties(model: nn.Module) -> list[set[str]]:
    """Groups of parameter names of the base that are one and the same parameter, merged into or not."""
    groups: dict[int, set[str]] = {}
    for name, module in base_modules(model):
        for key in module._parameters:
            if (parameter := own_parameter(module, key)) is not None:
                groups.setdefault(id(parameter), set()).add(joined(name, key))
    return [names for names in groups.values() if len(names) > 1]


def undo_ties(model: nn.Module, before: Iterable[set[str]]) -> None:
    """Make what a plain model no longer shares, of the ties `before`, weights of their own that a folder keeps."""
    now = weight_ties(model)
    if not (broken := [names for names in before if names not in now]):
        return
    if configs := list(_tying_configs(model)):
        may_say = all(_flag_only_ties(config) for config in configs) and not _reads_flag(model)
        for names in now if may_say else [names for names in now if any(names <= group for group in broken)]:
            separate(model, names)
        for config in configs if may_say else ():
            setattr(config, _FLAG, False)


def untied_groups(state: Mapping[str, Tensor], ties: Iterable[set[str]]) -> list[list[str]]:
    """The `ties` whose names have different values in `state`."""
    found = []
    for names in map(sorted, ties):
        first, *rest = (state[name] for name in names if name in state)
        if not all(one is first or torch.equal(one, first) for one in rest):
            found.append(names)
    return found


def separate(model: nn.Module, names: Iterable[str]) -> None:
    """Give each name but one a copy of the parameter."""
    for name in sorted(names)[1:]:
        owner, _, key = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._parameters[key]
        assert old is not None
        setattr(module, key, nn.Parameter(old.detach().clone(), old.requires_grad))


def _tying_configs(model: nn.Module) -> Iterator[_Config]:
    """The transformers configs of `model` that say its embeddings are tied."""
    config: _Config | None = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    inner: _Config | None = config if find is None else find()
    for one in {id(one): one for one in (config, inner)}.values():
        if one is not None and getattr(one, _FLAG, False):
            yield one


def _flag_only_ties(config: _Config) -> bool:
    """Whether a config without the flag is otherwise the same: T5's would stop to scale its outputs."""
    if not hasattr(config, "from_dict"):
        return True
    plain = copy.deepcopy(config).to_dict()
    made = type(config).from_dict({**plain, _FLAG: False}).to_dict()
    return made.get(_FLAG) is False and {**made, _FLAG: None} == {
        **type(config).from_dict(plain).to_dict(),
        _FLAG: None,
    }


def _reads_flag(model: nn.Module) -> bool:
    """Whether a forward of the model depends on the flag, as UMT5's does."""
    for kind in {type(module) for module in model.modules()}:
        try:
            if _FLAG in inspect.getsource(kind.forward):
                return True
        except (OSError, TypeError):  # no source to read
            continue
    return False
