"""Which layers a config means."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from lora_exp.adapters.config import ALL_LINEAR, LoraConfig
from lora_exp.adapters.inspection.traversal import lora_layers
from lora_exp.adapters.layers.registry import layer_class_for, layer_types, parts_of
from lora_exp.adapters.patterns import full_match, suffix_match
from lora_exp.adapters.variants.registry import takes_stacks, variant_class
from lora_exp.errors import UserError

_HEAD_NAMES = ("lm_head", "score", "classifier", "classification_head", "qa_outputs")
_BLOCK_INDEX = re.compile(r".*?\.(\d+)\.")  # the first number: blocks are outside, experts inside
_REFUSED = {
    "MultiheadAttention": "its projections are packed into one parameter that is not a layer",
    "ConvTranspose1d": "a transposed convolution has no low-rank form here",
    "ConvTranspose2d": "a transposed convolution has no low-rank form here",
    "ConvTranspose3d": "a transposed convolution has no low-rank form here",
    "Bilinear": "a bilinear layer has two inputs",
    "RNN": "a recurrent layer's kernel reads its weights without calling a layer",
    "LSTM": "a recurrent layer's kernel reads its weights without calling a layer",
    "GRU": "a recurrent layer's kernel reads its weights without calling a layer",
}


@dataclasses.dataclass
class Targets:
    """`layers` to adapt, by name; `skipped`: what an open-ended wish would cover but cannot, and why."""

    layers: dict[str, nn.Module] = dataclasses.field(default_factory=dict)
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)


def find_targets(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> Targets:
    """The layers among `modules` that `config` names; a name that names nothing is an error."""
    layer_types(config.layer_types)  # raises for one that there is not
    chosen = _named(modules, config) if _is_explicit(config) else _by_type(model, modules, config)
    chosen = without_excluded(chosen, modules, config)
    chosen = _in_blocks(chosen, config)
    targets = _adaptable(chosen, modules, config)
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(field, getattr(config, field) or {}, targets.layers)
    if not targets.layers:
        raise UserError(f"{_wish(config)} leaves no layer to adapt{_skipped_note(targets.skipped)}")
    return targets


def saved_names(modules: dict[str, nn.Module], config: LoraConfig) -> list[str]:
    """The full names that `modules_to_save` stands for; outermost only, all checks included."""
    if config.modules_to_save is None:
        return []
    found = matching(config.modules_to_save, modules, "modules_to_save")
    if "" in found:
        raise UserError("modules_to_save names the whole model; name a part of it, such as its head")
    outer = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    for name in outer:
        if adapted := [inner for inner, _ in lora_layers(modules[name])]:
            raise UserError(
                f"modules_to_save: {name} holds layers of another adapter ({adapted[0] or 'itself'}); "
                "exclude them from that adapter, or save this module there too"
            )
    return sorted(outer)


def value_for(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """The first pattern that matches a layer's name or a dotted suffix of it, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if matches_pattern(pattern, name):
            return value
    return default


def matches_pattern(pattern: str, name: str) -> bool:
    return suffix_match(pattern, name)


def matching(wish: list[str] | str, names: Iterable[str], what: str) -> set[str]:
    """Names that a list of dotted suffixes or a full-match regular expression covers; every entry must."""
    names = list(names)
    if isinstance(wish, str):
        found = {name for name in names if full_match(wish, name)}
        if not found:
            raise UserError(
                f"{what}={wish!r} matches no module's full name{near(wish, names)}; a string is a regular "
                "expression over full names, so put plain names or suffixes into a list"
            )
        return found
    hits: dict[str, set[str]] = {entry: set() for entry in wish}
    for name in names:
        for suffix in suffixes(name):
            if suffix in hits:
                hits[suffix].add(name)
    if missed := [entry for entry in wish if not hits[entry]]:
        hints = "; ".join(f"{entry!r}{near(entry, names)}" for entry in missed)
        raise UserError(f"{what} names no module of this model: {hints}")
    return set().union(*hits.values())


def near(wanted: str, names: Iterable[str]) -> str:
    """A hint that lists what the user may have meant."""
    last = wanted.split(".")[-1]
    endings = dict.fromkeys(name.split(".")[-1] for name in names if not name.split(".")[-1].isdigit())
    found = difflib.get_close_matches(last, endings, n=5, cutoff=0.4) or list(endings)[:8]
    return f" (near: {', '.join(found)})" if found else ""


def _is_explicit(config: LoraConfig) -> bool:
    return config.target_modules is not None and config.target_modules != ALL_LINEAR


def _by_type(model: nn.Module, modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, bool]:
    """Every layer of the wished types but those of the output head, as {name: was it named itself}."""
    kinds = ("linear",) if config.target_modules == ALL_LINEAR else config.layer_types
    head = output_head(model)
    of_kind, inside = _of_kind(kinds), set() if head is None else set(head.modules())
    return {name: False for name, module in modules.items() if module not in inside and of_kind(module)}


def _named(modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, bool]:
    """The modules that target_modules names; a container in a list stands for the layers inside it."""
    wish = config.target_modules
    assert wish is not None
    hits = matching(wish, modules, "target_modules")
    if isinstance(wish, str):
        return {name: True for name in modules if name in hits and _is_layer(modules[name])}
    chosen, of_kind = {}, _of_kind(config.layer_types)
    for name, module in modules.items():
        inside = any(parent in hits for parent in parents(name))
        if name in hits and (_is_layer(module) or not _holds_others(module)):
            chosen[name] = True
        elif inside and of_kind(module):
            chosen[name] = False
    return chosen


def _of_kind(wished: tuple[str, ...]) -> Callable[[nn.Module], bool]:
    kinds = layer_types(wished)

    def is_of_kind(module: nn.Module) -> bool:
        kind = layer_class_for(module)
        return kind is not None and kind.layer_type in kinds

    return is_of_kind


def _is_layer(module: nn.Module) -> bool:
    """Something with a weight of its own, adaptable or not; not a container, not an activation."""
    if layer_class_for(module) is not None or type(module).__name__ in _REFUSED:
        return True
    return any(True for _ in module.parameters(recurse=False)) and not _holds_others(module)


def _holds_others(module: nn.Module) -> bool:
    return any(True for _ in module.children()) or len(parts_of(module)) > 0


def without_excluded(chosen: dict[str, bool], modules: dict[str, nn.Module], config: LoraConfig) -> dict[str, bool]:
    """`chosen` without what `exclude_modules` and `modules_to_save` name, and what is inside of that."""
    out: set[str] = set()
    if config.exclude_modules is not None:
        out |= matching(config.exclude_modules, modules, "exclude_modules")
    if config.modules_to_save is not None:
        out |= matching(config.modules_to_save, modules, "modules_to_save")
    return {
        name: named
        for name, named in chosen.items()
        if name not in out and not any(parent in out for parent in parents(name))
    }


def _in_blocks(chosen: dict[str, bool], config: LoraConfig) -> dict[str, bool]:
    wish = config.layers_to_transform
    if wish is None:
        return chosen
    wanted = {wish} if isinstance(wish, int) else set(wish)
    index = {name: block for name in chosen if (block := block_of(name)) is not None}
    if missing := sorted(wanted - set(index.values())):
        present = sorted(set(index.values()))
        have = f"{present[0]} to {present[-1]}" if present else "none"
        raise UserError(f"layers_to_transform: no targeted layer in block {missing}; blocks here: {have}")
    return {name: named for name, named in chosen.items() if index.get(name) in wanted}


def block_of(name: str) -> int | None:
    """The number of the block that a layer is in; None outside of numbered blocks."""
    found = _BLOCK_INDEX.match(f".{name}")
    return int(found[1]) if found else None


def _adaptable(chosen: dict[str, bool], modules: dict[str, nn.Module], config: LoraConfig) -> Targets:
    targets, problems = Targets(), []
    for name, named in chosen.items():
        reason = _refusal(modules, name, config)
        if reason is None:
            targets.layers[name] = modules[name]
        elif named:
            problems.append(f"{name} ({type(modules[name]).__name__}): {reason}")
        else:
            targets.skipped[name] = reason
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(
            f"target_modules names what cannot be adapted: {'; '.join(problems[:5])}{more}; "
            "name other layers or take these out with exclude_modules"
        )
    return targets


def _refusal(modules: dict[str, nn.Module], name: str, config: LoraConfig) -> str | None:
    """Why a module cannot be adapted; None if it can."""
    module, parent = modules[name], modules.get(name.rpartition(".")[0]) if name else None
    kind = layer_class_for(module)
    if kind is None:
        generic = "no adapter knows this kind of layer (linear, embedding and convolution are known)"
        return _REFUSED.get(type(module).__name__, generic)
    if isinstance(parent, nn.MultiheadAttention):
        return "MultiheadAttention reads this weight without calling the layer"
    if kind.is_stack and not takes_stacks(variant_class(config.variant, config.variant_options)):
        return f"variant {config.variant!r} is not defined for many weights in one parameter; use variant 'lora' there"
    return kind.refusal(module, int(value_for(name, config.rank_pattern, config.rank)))


def output_head(model: nn.Module) -> nn.Module | None:
    """What makes logits, a layer or a container of some: the model's own word for it, else its usual name."""
    ask = getattr(model, "get_output_embeddings", None)
    head: nn.Module | None = ask() if callable(ask) else None
    if head is not None:
        return head
    return next((getattr(model, name) for name in _HEAD_NAMES if hasattr(model, name)), None)


def _check_patterns(field: str, patterns: Mapping[str, float], layers: Iterable[str]) -> None:
    layers = list(layers)
    missed = [key for key in patterns if not any(matches_pattern(key, name) for name in layers)]
    if missed:
        hints = "; ".join(f"{key!r}{near(key, layers)}" for key in missed)
        raise UserError(f"{field} matches no adapted layer: {hints}")


def suffixes(name: str) -> Iterable[str]:
    """a.b.c -> a.b.c, b.c, c"""
    while name:
        yield name
        name = name.partition(".")[2]


def parents(name: str) -> Iterable[str]:
    """a.b.c -> a.b, a"""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _wish(config: LoraConfig) -> str:
    if config.target_modules is None:
        return f"layer_types={list(config.layer_types)}"
    return f"target_modules={config.target_modules!r}"


def _skipped_note(skipped: dict[str, str]) -> str:
    if not skipped:
        return "; name layers in target_modules, or choose other layer_types"
    name, reason = next(iter(skipped.items()))
    return f"; {len(skipped)} skipped, such as {name}: {reason}"
