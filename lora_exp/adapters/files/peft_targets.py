"""Which modules a PEFT config means, by PEFT's own rules (0.21, tuners_utils.py and utils/other.py).

They differ from ours: what names nothing is passed over, `modules_to_save` matches any ending and hides what is
inside, block numbers are read by `layers_pattern`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import nn

from lora_exp.adapters.config import ALL_LINEAR, Json
from lora_exp.adapters.layers.registry import layer_class_for
from lora_exp.adapters.patterns import full_match, prefix_match, suffix_match
from lora_exp.adapters.surgery.targets import suffixes
from lora_exp.errors import UserError

_FIRST_NUMBER = re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")
_HEAD_NAMES = ("score", "classifier")  # of sequence classification, in PEFT's order
_Value = TypeVar("_Value")
Wish = Json  # fields of adapter_config.json


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(entry, str) and entry for entry in value)


def _is_names_or_expression(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_indices(value: object) -> bool:
    return all(type(index) is int for index in (value if isinstance(value, list) else [value]))


_TYPES: dict[str, tuple[str, Callable[[object], bool]]] = {
    "target_modules": ("a list of names or a regular expression", _is_names_or_expression),
    "exclude_modules": ("a list of names or a regular expression", _is_names_or_expression),
    "layers_pattern": ("a name or a list of names", _is_names_or_expression),
    "modules_to_save": ("a list of names", _is_names),
    "layers_to_transform": ("block numbers", _is_indices),
    "rank_pattern": ("an object", lambda value: isinstance(value, dict)),
    "alpha_pattern": ("an object", lambda value: isinstance(value, dict)),
}


def adapted_names(wish: Wish, names: Iterable[str]) -> set[str]:
    """The modules that PEFT adapts, where `target_modules` is an expression or a list."""
    target, excluded = wish.get("target_modules"), wish.get("exclude_modules")
    saved = wish.get("modules_to_save") or []
    wanted, unwanted = covering(target), covering(excluded)
    found = {name for name in names if name and wanted(name) and not unwanted(name)}
    found = {name for name in found if not any(_hides(entry, name) for entry in saved)}
    blocks = wish.get("layers_to_transform")
    if isinstance(target, str) or blocks is None or blocks == []:
        return found
    chosen = {blocks} if isinstance(blocks, int) else set(blocks)
    exact = set(target or ()) & found  # a full name is adapted in whatever block it is
    return exact | {name for name in found if _block(wish.get("layers_pattern"), name) in chosen}


def saved_names(wish: Wish, names: Iterable[str]) -> set[str]:
    """The modules that PEFT trains in full: any ending counts, without a dot in front."""
    saved = tuple(wish.get("modules_to_save") or ())
    return {name for name in names if name.endswith(saved)} if saved else set()


def all_linear(model: nn.Module, modules: Mapping[str, nn.Module], task_type: str | None) -> set[str]:
    """What PEFT makes of "all-linear": all but the layer of the logits, of a transformers model."""
    head, ask = None, getattr(model, "get_output_embeddings", None)
    if callable(ask):
        head = ask()
        if head is None and task_type == "SEQ_CLS":
            head = next((found for name in _HEAD_NAMES if (found := getattr(model, name, None)) is not None), None)
    kinds = {name: layer_class_for(module) for name, module in modules.items() if module is not head}
    return {name for name, kind in kinds.items() if kind is not None and kind.layer_type == "linear"}


def is_all_linear(target: object) -> bool:
    return isinstance(target, str) and target.lower() == ALL_LINEAR


def covering(wish: list[str] | str | None) -> Callable[[str], bool]:
    """Whether a list of dotted suffixes, or an expression for full names, means a module."""
    if isinstance(wish, str) and wish:
        return functools.partial(full_match, wish)
    entries = set(wish or ())
    return lambda name: any(suffix in entries for suffix in suffixes(name))


def check_types(wish: Wish, source: str) -> None:
    """Raise one ValueError for fields that hold something else than they must."""
    wrong = [
        f"{field}={wish[field]!r} must be {meant}"
        for field, (meant, is_right) in _TYPES.items()
        if wish.get(field) is not None and not is_right(wish[field])
    ]
    if wrong:
        raise UserError(f"{source}: {'; '.join(wrong)}; copy the adapter anew")


def matched(patterns: Mapping[str, _Value] | None, names: Iterable[str]) -> dict[str, _Value] | None:
    """The rank or alpha patterns that some module matches, in their order: the first that matches counts."""
    names = list(names)
    return {key: value for key, value in (patterns or {}).items() if any(suffix_match(key, n) for n in names)} or None


def _hides(entry: str, name: str) -> bool:
    return full_match(rf"(^|.*\.){entry}($|\..*)", name)


def _block(pattern: str | list[str] | None, name: str) -> int | None:
    if not pattern:
        found = _FIRST_NUMBER.match(name)
        return int(found["idx"]) if found else None
    for one in [pattern] if isinstance(pattern, str) else pattern:
        if found := prefix_match(rf"(?:^|.*?\.){one}\.(?P<idx>\d+)\.", name):
            return int(found["idx"])
    return None
