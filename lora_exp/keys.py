"""The keys of the config: which there are, and which one was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import omegaconf
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, ValidationError

from lora_exp.config import Config, DataConfig, data_kinds
from lora_exp.schema import data_section

_TYPES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    list: "a list",
    dict: "a mapping",
}


def unknown_key(path: str, place: str = "", data_kind: str | None = None) -> str | None:
    """Why the dotted ``path`` is no key of the config, and which may have been meant; None where it is one.

    ``place`` is the file that it stands in. Below ``data`` are the fields of ``data_kind``; None: those of any kind.
    """
    kind: object = Config
    parts = re.sub(r"\[(.*?)\]", r".\1", path).split(".")
    for depth, part in enumerate(parts):
        section = _section(kind)
        if section is None:
            if _is_open(kind):
                return None
            return f"{path}{place} is not a key of the config: {'.'.join(parts[:depth])} has none below it"
        known = _fields(section, data_kind)
        if part not in known:
            of_kind = f" of data.kind={data_kind}" if data_kind and section is DataConfig else ""
            return f"{path}{place} is not a key{of_kind or ' of the config'}: {_meant(parts, depth, known, data_kind)}"
        kind = known[part]
    return None


def unknown_keys(composed: DictConfig) -> list[str]:
    """The same for each key of a composed config that is not in the schema (``hydra`` aside)."""
    kind = str(composed.data.kind)
    if problem := data_kinds.problem(kind):
        return [problem]
    given = OmegaConf.to_container(composed.data)
    assert isinstance(given, dict)
    data = [f"data.{name!s}{below}" for name, value in given.items() for below in _below_mapping(value)]
    paths = [path for path in _paths(composed) if path.partition(".")[0] not in ("hydra", "data")]
    found = (unknown_key(path, data_kind=kind) for path in [*paths, *data])
    return [problem for problem in found if problem]


def _below_mapping(value: object) -> list[str]:
    return [f".{name}" for name in value] if isinstance(value, dict) and value else [""]


def wrong_data(composed: DictConfig) -> list[str]:
    """What the field of ``data`` wants whose value is of another type than its kind says."""
    try:
        data_section(composed.data)
    except ValidationError as error:
        return [wrong_value(f"data.{error.full_key}", error.value)]
    except MissingMandatoryValue:  # said when all of the config is converted
        return []
    return []


def wrong_value(path: str, value: object, place: str = "") -> str:
    """What the known key ``path`` wants instead of ``value``."""
    name, index = re.fullmatch(r"(.*?)((?:\[\w+\])*)", path).groups()  # type: ignore[union-attr]
    kind, default = _looked_up(name)
    wanted = get_args(kind)[0] if index and get_args(kind) else kind
    example = "" if default is None else f": such as {name}={_as_typed(default)}"
    return f"{path}={_as_typed(value)}{place} is not {_named(wanted)}{example}"


def nearest(name: str, among: list[str]) -> list[str]:
    """Up to three of ``among`` that ``name`` may be a slip of, likeliest first."""
    near = difflib.get_close_matches(name, among, n=3)
    near = near or [other for other in among if name and other.startswith(name)][:3]
    best = max((_likeness(name, other) for other in near), default=0)
    return [other for other in near if _likeness(name, other) > best - 0.15]


def _meant(parts: list[str], depth: int, known: dict[str, object], data_kind: str | None) -> str:
    siblings = list(known)
    above = ".".join([*parts[:depth], ""])[:]
    near = [above + name for name in nearest(parts[depth], siblings)] if depth == len(parts) - 1 else []
    leaves = list(_below(Config, "", data_kind))
    near = near or nearest(".".join(parts), leaves)
    near = near or [leaf for leaf in leaves if leaf.rpartition(".")[2] == parts[-1]]
    if near:
        return f"did you mean {' or '.join(near)}?"
    return f"{above.rstrip('.') or 'it'} has {', '.join(siblings)}"


def _likeness(one: str, other: str) -> float:
    return difflib.SequenceMatcher(None, one, other).ratio()


def _below(section: type, prefix: str, data_kind: str | None) -> Iterator[str]:
    for name, kind in _fields(section, data_kind).items():
        deeper = _section(kind)
        if deeper is None:
            yield prefix + name
        else:
            yield from _below(deeper, f"{prefix}{name}.", data_kind)


def _fields(section: type, data_kind: str | None = None) -> dict[str, object]:
    """The annotations of a section's fields; of ``data``, those of its kind, or of every kind."""
    kinds = [section]
    if section is DataConfig:
        kinds = [data_kinds[name] for name in ([data_kind] if data_kind else data_kinds.names())]
    hints = {name: hint for kind in kinds for name, hint in get_type_hints(kind).items()}
    return {field.name: hints[field.name] for kind in kinds for field in fields(kind)}


def _section(kind: object) -> type | None:
    """The dataclass behind an annotation such as ``PackagedConfig | None``."""
    return next(
        (option for option in (kind, *get_args(kind)) if isinstance(option, type) and is_dataclass(option)), None
    )


def _is_open(kind: object) -> bool:
    """Whether what is below is anybody's: a mapping, a list, or anything at all."""
    return any(option is Any or get_origin(option) in (dict, list) for option in (kind, *get_args(kind)))


def _paths(composed: DictConfig, prefix: str = "") -> Iterator[str]:
    """Every key but those inside of mappings; a key that is not in the schema as it is, however deep it goes."""
    for key in map(str, composed):
        path = f"{prefix}{key}"
        below = (
            None
            if OmegaConf.is_missing(composed, key) or OmegaConf.is_interpolation(composed, key)
            else composed._get_node(key)
        )
        if isinstance(below, DictConfig) and not below._is_none() and _has_schema(below):
            yield from _paths(below, f"{path}.")
        else:
            yield path


def _has_schema(node: DictConfig) -> bool:
    kind = OmegaConf.get_type(node)
    return kind is not None and is_dataclass(kind)


def _looked_up(path: str) -> tuple[object, object]:
    """The annotation of a known key, and its default."""
    kind: object = Config
    field: Field[object] | None = None
    for part in path.split("."):
        section = _section(kind)
        if section is None or part not in (hints := _fields(section)):
            return Any, None
        owners = [section, *(data_kinds[name] for name in data_kinds.names() if section is DataConfig)]
        kind, field = hints[part], next(own for owner in owners for own in fields(owner) if own.name == part)
    return kind, _default(field) if field else None


def _default(field: Field[object]) -> object:
    if "such_as" in field.metadata:  # null is what stands there, and no example
        return field.metadata["such_as"]
    if field.default_factory is not NO_DEFAULT:
        made = field.default_factory()
        return None if is_dataclass(made) or not made else made
    return None if field.default in (NO_DEFAULT, omegaconf.MISSING) else field.default


def _named(kind: object) -> str:
    for option in (kind, *get_args(kind)):
        if (name := _TYPES.get(get_origin(option) or option)) is not None:
            return name
    section = _section(kind)
    return f"a section with {', '.join(_fields(section))}" if section else "what it may be"


def _as_typed(value: object) -> str:
    """As one would write it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{','.join(_as_typed(item) for item in value)}]"
    return str(value)
