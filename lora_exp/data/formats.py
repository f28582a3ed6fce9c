"""Records out of files, one at a time and never a whole file in memory: JSON Lines, JSON, CSV, TSV and Parquet.

What is broken is handed over as such with its place, so that who reads decides what becomes of it. UserError is for
files of which nothing more can be read.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from pathlib import Path

from lora_exp.data.broken import Broken
from lora_exp.data.json_list import list_items
from lora_exp.data.values import in_words
from lora_exp.errors import UserError

Record = dict[str, object]
Read = Iterator[tuple[str, "Record | Broken"]]
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_ROWS = 1000


def read_file(file: Path) -> Read:
    """Each record of a file with its place, such as ("data.jsonl, line 3", {...})."""
    refuse_utf16(file)
    return _READERS[file.suffix.lower()](file)


def refuse_utf16(file: Path) -> None:
    """Raise UserError for a file of UTF-16, whose every line would be broken."""
    with file.open("rb") as stream:
        if stream.read(2).startswith(_UTF16):
            raise UserError(f"{file} is UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8 OLD > NEW)")


def _json_lines(file: Path) -> Read:
    number = 0
    with file.open("rb") as stream:
        for raw in stream:
            for line in raw.splitlines():  # also those that end in \r alone
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield f"{file}, line {number}", _parsed(line)


def _parsed(line: bytes) -> Record | Broken:
    try:
        return _object(json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        return Broken(f"not UTF-8 text ({error.reason} at byte {error.start})")
    except (json.JSONDecodeError, RecursionError) as error:
        return Broken(f"not JSON ({error})")


def _object(value: object) -> Record | Broken:
    if isinstance(value, dict):
        return value
    return Broken(f'{in_words(value)}, and must be an object such as {{"text": "…"}}')


def _json(file: Path) -> Read:
    for number, value in enumerate(list_items(file), start=1):
        yield f"{file}, item {number}", value if isinstance(value, Broken) else _object(value)


def _csv(file: Path) -> Read:
    return _table(file, ",")


def _tsv(file: Path) -> Read:
    return _table(file, "\t")


def _table(file: Path, delimiter: str) -> Read:
    csv.field_size_limit(2**31 - 1)
    # Bytes that are no UTF-8 come through as lone surrogates: one broken row, and not the end of the file.
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(stream, delimiter=delimiter, strict=True)
        header = next(rows, [])
        if len(set(header)) != len(header):
            twice = next(name for name in header if header.count(name) > 1)
            raise UserError(f"{file} names a column twice ({twice!r}): its first line must name each column once")
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"{file}, line {line}", Broken(f"no row of a table ({error})")
                continue
            if row:
                yield f"{file}, line {line}", _row(header, row)


def _row(header: list[str], row: list[str]) -> Record | Broken:
    if len(row) != len(header):
        return Broken(f"{len(row)} columns, and the first line names {len(header)}")
    if any("\udc80" <= character <= "\udcff" for value in row for character in value):
        return Broken("not UTF-8 text")
    return dict(zip(header, row, strict=True))


def _parquet(file: Path) -> Read:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", record
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet after row {number} ({error}): copy it anew") from None


_READERS = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".parquet": _parquet}
