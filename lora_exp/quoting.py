"""Texts for a model to read on the command line, in the quotes that Hydra's grammar wants around a comma."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

_TEXTS = ("generate.prompt", "generate.system")
_ENCLOSED = (("'", "'"), ('"', '"'), ("[", "]"))


def texts_quoted(arguments: Sequence[str]) -> list[str]:
    """The same command line, but of a sweep, where a comma may stand between two values."""
    if any(argument in ("-m", "--multirun") for argument in arguments):
        return list(arguments)
    return [_quoted(argument) for argument in arguments]


def _quoted(argument: str) -> str:
    key, _, text = argument.partition("=")
    is_enclosed = bool(text) and (text[0], text[-1]) in _ENCLOSED and _is_override(argument)
    if key not in _TEXTS or text in ("", "null") or is_enclosed:
        return argument
    escaped = re.sub(r"(\\*)(\Z|')", lambda found: found[1] * 2 + ("\\'" if found[2] else ""), text)
    return f"{key}='{escaped.replace('${', chr(92) + '${')}'"


def _is_override(argument: str) -> bool:
    try:
        OverridesParser.create().parse_override(argument)
    except HydraException:
        return False
    return True
