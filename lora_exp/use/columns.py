"""Answers next to each other: columns that fill as they are written; without a terminal as they are at the end."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

_WIDTH = 80
_SIDE_BY_SIDE = 2  # more would be too narrow: then they are below each other


class Columns:
    """Of one prompt: a column for each of ``titles``. Use as a context manager."""

    def __init__(self, console: Console, prompt: str, titles: Sequence[str], expected: str | None = None) -> None:
        self._console, self._prompt, self._expected = console, prompt, expected
        self._texts = dict.fromkeys(titles, "")
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Columns:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._live:
            self._live.update(self._drawn(), refresh=True)
            self._live.stop()
        elif error is None:
            self._console.print(self._drawn())

    def update(self, title: str, text: str) -> None:
        """What one of them has written so far."""
        self._texts[title] = text
        if self._live:
            self._live.update(self._drawn(), refresh=True)

    def _drawn(self) -> Group:
        expected = {} if self._expected is None else {"held out": self._expected}
        texts = {title: _printable(text) for title, text in {**self._texts, **expected}.items()}
        table = _side_by_side(texts) if len(texts) <= _SIDE_BY_SIDE else _below_each_other(texts)
        return Group(Text(f"> {_printable(self._prompt)}", style="bold"), table)


def console() -> Console:
    """The terminal, or lines as wide as one."""
    terminal = Console(highlight=False)
    return terminal if terminal.is_terminal else Console(width=_WIDTH, highlight=False)


def _printable(text: str) -> str:
    """Without what a terminal would obey: a model writes any bytes."""
    return "".join("�" if unicodedata.category(sign) == "Cc" and sign != "\n" else sign for sign in text.expandtabs(4))


def _side_by_side(texts: Mapping[str, str]) -> Table:
    table = Table(expand=True)
    for title in texts:
        table.add_column(Text(title), ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts.values()))
    return table


def _below_each_other(texts: Mapping[str, str]) -> Table:
    table = Table(expand=True, show_header=False, show_lines=True)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1, overflow="fold")
    for title, text in texts.items():
        table.add_row(Text(title), Text(text))
    return table
