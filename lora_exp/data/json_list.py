"""The items of a JSON list, one at a time: the file is a list, or an object whose "data" is one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from lora_exp.errors import UserError

_PIECE = 2**20


def list_items(file: Path) -> Iterator[object]:
    """Raises UserError where the file stops being JSON: nothing after that place can be told apart."""
    try:
        with file.open(encoding="utf-8-sig") as stream:
            text = _Text(file, stream)
            if text.peek() == "{":
                _enter(text)
            elif text.peek() != "[":
                raise text.problem('neither a list nor {"data": […]}')
            text.take("[")
            yield from _items(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None


def _items(text: _Text) -> Iterator[object]:
    if text.peek() == "]":
        return
    while True:
        yield text.value()
        if text.take(",]") == "]":
            return


def _enter(text: _Text) -> None:
    """Go to the value of "data"."""
    text.take("{")
    seen = []
    while text.peek() != "}":
        name = text.value()
        text.take(":")
        if name == "data" and text.peek() == "[":
            return
        seen.append(str(name))
        text.value()
        if text.peek() != "}":
            text.take(",")
    raise text.problem(f'an object with {", ".join(seen[:10]) or "nothing"} and without a list "data"')


class _Text:
    """A JSON text of which no more than the value being read is in memory."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self._file, self._stream = file, stream
        self._buffer, self._at, self._line = "", 0, 1
        self._decode = json.JSONDecoder().raw_decode

    def peek(self) -> str:
        """The next character that is no space; "" at the end."""
        while True:
            while self._at < len(self._buffer) and self._buffer[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def take(self, among: str) -> str:
        found = self.peek()
        if not found or found not in among:
            raise self.problem(f"{found!r} where {' or '.join(among)} is due" if found else "cut off")
        self._at += 1
        return found

    def value(self) -> object:
        while True:
            self.peek()
            try:
                value, end = self._decode(self._buffer, self._at)
            except (json.JSONDecodeError, RecursionError) as error:
                if not self._more():
                    raise self.problem(f"not JSON: {getattr(error, 'msg', error)}") from None
                continue
            if end == len(self._buffer) and self._more():
                continue  # a number may go on
            self._at = end
            return value

    def problem(self, what: str) -> UserError:
        line = self._line + self._buffer.count("\n", 0, self._at)
        return UserError(f"{self._file}, line {line}: {what}. Mend the file; one record a line (.jsonl) loses less")

    def _more(self) -> bool:
        """Read on, twice as much as is left, so that a long value is not tried again and again."""
        piece = self._stream.read(max(_PIECE, len(self._buffer) - self._at))
        self._line += self._buffer.count("\n", 0, self._at)
        self._buffer, self._at = self._buffer[self._at :] + piece, 0
        return bool(piece)
