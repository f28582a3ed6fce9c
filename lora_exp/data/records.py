"""What is wrong with a field of a record: a reason in words, with the next move, for ``BadRecords`` or ``Broken``."""

from __future__ import annotations

import difflib

from lora_exp.data.formats import Record
from lora_exp.data.values import in_words


def text_problem(record: Record, name: str, key: str, may_be_empty: bool = False) -> str | None:
    """Why ``record`` has no text under ``name``, which the config key ``key`` (data.text_field) has named."""
    texts = [field for field, value in record.items() if isinstance(value, str)]
    if name not in record:
        return missing_field(record, name, key, texts)
    text = record[name]
    if not isinstance(text, str):
        others = f", or set {key} to what holds it ({', '.join(texts[:20])})" if texts else ""
        return f"{name} is {in_words(text)}, and must be text: mend or remove it{others}"
    if not _is_encodable(text):
        return f"{name} holds half of a surrogate pair, which is no character: mend it"
    return None if may_be_empty or text.strip() else f"{name} is empty"


def group_problem(record: Record, name: str) -> str | None:
    """Why records cannot be grouped by this one's ``name``."""
    if name not in record:
        return missing_field(record, name, "data.group_by", list(record), "[{}]")
    if record[name] is None or isinstance(record[name], (list, dict)):
        return (
            f"{name} is {in_words(record[name])}, and lines are grouped by text or numbers: "
            "mend it, or leave the field out of data.group_by"
        )
    return None


def missing_field(record: Record, name: str, key: str, fitting: list[str], shape: str = "{}") -> str:
    """That ``record`` lacks ``name``, and which of the ``fitting`` fields may be meant; ``shape`` is the value's."""
    near = difflib.get_close_matches(name, fitting, n=1) or (fitting if len(fitting) == 1 else [])
    value = shape.format(near[0]) if near else "FIELD"
    has = f"it has {', '.join(map(str, list(record)[:20]))}" if record else "it is empty"
    return f"lacks {name} ({has}): set {key}={value}, or mend it"


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
