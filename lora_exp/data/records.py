"""Documents out of JSON Lines, every line looked at: what is wrong is named with its file, line, field and value."""

from __future__ import annotations

import codecs
import difflib
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.errors import UserError

if TYPE_CHECKING:
    from lora_exp.data.kinds.text import Text

Record = dict[str, object]
_MOST_SHOWN = 60
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def read_documents(file: Path, section: Text) -> list[str]:
    """The ``text_field`` of each line, or, with ``group_by``, of neighbouring lines that share those fields.

    Without the empty ones. Raises UserError for a line that has no such text.
    """
    return [text for text in _documents(file, section) if text.strip()]


def read_text(file: Path) -> str:
    """A UTF-8 file, with or without a byte order mark. Raises UserError for another encoding."""
    raw = file.read_bytes()
    if raw.startswith(_UTF16):
        raise UserError(f"{file} is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8 OLD > NEW)")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _documents(file: Path, section: Text) -> Iterator[str]:
    records = _records(file, section)
    if not section.group_by:
        yield from (str(record[section.text_field]) for record in records)
        return
    for shared, group in itertools.groupby(records, key=lambda record: tuple(record[n] for n in section.group_by)):
        texts = [text for record in group if (text := str(record[section.text_field])).strip()]
        if texts:
            yield "\n".join([" ".join(map(str, shared)), *texts])


def _records(file: Path, section: Text) -> Iterable[Record]:
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{file}, line {number}"
        try:
            record = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"{where} is not JSON ({error}): mend or remove it") from None
        if not isinstance(record, dict):
            raise UserError(f'{where} is {_kind(record)}, and must be an object such as {{"text": "…"}}')
        _check_text(record, section, where)
        for name in section.group_by:
            _check_group(record, name, where)
        yield record


def _check_text(record: Record, section: Text, where: str) -> None:
    name, texts = section.text_field, [key for key, value in record.items() if isinstance(value, str)]
    if name not in record:
        raise UserError(_lacks(record, name, where, "data.text_field=", texts))
    text = record[name]
    if not isinstance(text, str):
        others = f", or set data.text_field to what holds it ({', '.join(texts[:20])})" if texts else ""
        raise UserError(f"{where}: {name} is {_kind(text)}, and must be text: mend or remove the line{others}")
    if not _is_encodable(text):
        raise UserError(f"{where}: {name} holds half of a surrogate pair, which is no character: mend the line")


def _check_group(record: Record, name: str, where: str) -> None:
    if name not in record:
        raise UserError(_lacks(record, name, where, "data.group_by=", list(record)))
    if record[name] is None or isinstance(record[name], (list, dict)):
        raise UserError(
            f"{where}: {name} is {_kind(record[name])}, and lines are grouped by text or numbers: "
            "mend the line, or leave the field out of data.group_by"
        )


def _lacks(record: Record, name: str, where: str, key: str, fitting: list[str]) -> str:
    near = difflib.get_close_matches(name, fitting, n=1) or (fitting if len(fitting) == 1 else [])
    value = f"[{near[0]}]" if near and "group_by" in key else near[0] if near else "FIELD"
    has = f"it has {', '.join(map(str, list(record)[:20]))}" if record else "it is empty"
    return f"{where} lacks {name} ({has}): set {key}{value}, or mend the line"


def _is_encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: object) -> str:
    """A JSON value in words, such as "null", "the number 3", "the list [1, 2]"."""
    shown = json.dumps(value, ensure_ascii=False)
    shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}…"
    names = {list: "the list ", dict: "the object ", int: "the number ", float: "the number ", str: "the text "}
    return f"{names.get(type(value), '')}{shown}"
