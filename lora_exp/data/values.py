"""Values of records in words, for messages."""

from __future__ import annotations

import json

_MOST_SHOWN = 60


def in_words(value: object) -> str:
    """A JSON value in words, such as "null", "the number 3", "the list [1, 2]"."""
    shown = json.dumps(value, ensure_ascii=False, default=str)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"
    names = {list: "the list ", dict: "the object ", int: "the number ", float: "the number ", str: "the text "}
    return f"{names.get(type(value), '')}{shown}"
