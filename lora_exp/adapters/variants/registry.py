"""Which variants there are: each is a class in a file of its own, registered by its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lora_exp.errors import UserError
from lora_exp.registry import Registry, check_options

if TYPE_CHECKING:
    from lora_exp.adapters.variants.lora import LoraAdapter
    from lora_exp.adapters.variants.peft_format import PeftFormat

_VARIANTS: Registry[type[LoraAdapter]] = Registry("variant", "lora_exp.adapters.variants")
_Variant = TypeVar("_Variant", bound="type[LoraAdapter]")


def variant(name: str) -> Callable[[_Variant], _Variant]:
    """Class decorator: this class is what `LoraConfig(variant=name)` means."""

    def register(kind: _Variant) -> _Variant:
        _VARIANTS.add(name)(kind)
        kind.variant = name
        return kind

    return register


def variant_named(name: str) -> type[LoraAdapter]:
    """Raises UserError for a name that is none."""
    if _VARIANTS.problem(name):
        raise UserError(f"variant={name!r} is no variant; choose one of {', '.join(variant_names())}")
    return _VARIANTS[name]


def variant_names() -> list[str]:
    return _VARIANTS.names()


def peft_formats() -> dict[str, PeftFormat]:
    """How the variants are written in PEFT's folders, by PEFT's `peft_type`."""
    kinds = [_VARIANTS[name] for name in _VARIANTS.names()]
    return {kind.peft_format.peft_type: kind.peft_format for kind in kinds}


def variant_class(name: str, options: Mapping[str, object]) -> type[LoraAdapter]:
    """The class, after a look whether it takes these options. Raises UserError for one that it does not know."""
    kind = variant_named(name)
    check_options("variant_options", name, kind, options)
    return kind


def takes_stacks(kind: type[LoraAdapter]) -> bool:
    """Whether a variant is defined for a host that `is_stack`. No class inherits that from one with other formulas."""
    return bool(vars(kind).get("takes_stacks", False))
