"""Which variants there are: each is a class in a file of its own, registered by its decorator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from lora_exp.adapters.discovery import check_options, import_all
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.adapters.variants.lora import LoraAdapter
    from lora_exp.adapters.variants.peft_format import PeftFormat

_VARIANTS: dict[str, type[LoraAdapter]] = {}
_Variant = TypeVar("_Variant", bound="type[LoraAdapter]")


def variant(name: str) -> Callable[[_Variant], _Variant]:
    """Class decorator: this class is what `LoraConfig(variant=name)` means."""

    def register(kind: _Variant) -> _Variant:
        if (known := _VARIANTS.get(name)) is not None and known.__qualname__ != kind.__qualname__:
            raise UserError(f"variant {name!r} is registered already, as {known.__module__}.{known.__qualname__}")
        kind.variant = name
        _VARIANTS[name] = kind
        return kind

    return register


def variant_named(name: str) -> type[LoraAdapter]:
    """Raises UserError for a name that is none."""
    import_all("lora_exp.adapters.variants")
    if name not in _VARIANTS:
        raise UserError(f"variant={name!r} is no variant; choose one of {', '.join(variant_names())}")
    return _VARIANTS[name]


def variant_names() -> list[str]:
    import_all("lora_exp.adapters.variants")
    return sorted(_VARIANTS)


def peft_formats() -> dict[str, PeftFormat]:
    """How the variants are written in PEFT's folders, by PEFT's `peft_type`."""
    import_all("lora_exp.adapters.variants")
    return {kind.peft_format.peft_type: kind.peft_format for kind in _VARIANTS.values()}


def variant_class(name: str, options: Mapping[str, object]) -> type[LoraAdapter]:
    """The class, after a look whether it takes these options. Raises UserError for one that it does not know."""
    kind = variant_named(name)
    check_options("variant_options", name, kind, options)
    return kind


def takes_stacks(kind: type[LoraAdapter]) -> bool:
    """Whether a variant is defined for a host that `is_stack`. No class inherits that from one with other formulas."""
    return bool(vars(kind).get("takes_stacks", False))
