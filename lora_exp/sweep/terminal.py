"""The table as a terminal shows it: however narrow it is, what was swept, the result and the status are readable."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table as RichTable

from lora_exp.sweep.table import Table

# What a narrow terminal leaves out, first to last, before it leaves out metrics; comparison.csv has it all.
_LEAST_NEEDED = ("wall s", "base MB", "adapter MB", "trainable", "logits", "trained", "base", "perplexity")
_LONG = 24  # columns of a value that may be broken
_REASON, _STATUS = 20, 12  # columns that a reason for failing is given at least; in want of room
_WITHOUT_TERMINAL = 140
_TITLE = "Sweep, best first"


@dataclass(frozen=True)
class Column:
    """A column ``width`` wide, its ``header`` broken into lines; longer cells are too."""

    name: str
    header: str
    width: int


def show(table: Table) -> None:
    """Print it, in a list where not even what is needed has room side by side."""
    console = Console()
    console = Console(width=console.width if console.is_terminal else _WITHOUT_TERMINAL)
    columns = fitting(table, console.width)
    if _total(columns) > console.width:
        console.print(listed(table), markup=False, highlight=False, soft_wrap=True)
    else:
        console.print(_drawn(table, columns, console.width), markup=False)


def fitting(table: Table, width: int) -> list[Column]:
    """The columns for a terminal of ``width``: of sizes, times and further metrics as many as have room.

    First headers are broken into lines, then columns left out, then long values (of targets, a
    reason) broken into lines. What is needed is always there, even without room.
    """
    columns = _columns(table, breaks=False)
    if _total(columns) > width:
        columns = _columns(table, breaks=True)
    for name in [*_LEAST_NEEDED, *reversed(table.results)]:
        if _total(columns) <= width:
            break
        if name not in table.needed:
            columns = [column for column in columns if column.name != name]
    if _total(columns) > width:
        most = {"status": _STATUS}
        columns = [replace(column, width=min(column.width, most.get(column.name, _LONG))) for column in columns]
    return columns


def listed(table: Table) -> str:
    """The same as a line of names and values a job."""
    lines = [_TITLE]
    for row in table.rows:
        cells = dict(zip(table.header, row, strict=True))
        told = [f"{name}={cells[name]}" for name in table.needed[1:-1] if cells[name]]
        lines.append(f"job {cells['job']}: {'  '.join(told)}  {cells['status']}")
    return "\n".join(lines)


def _columns(table: Table, breaks: bool) -> list[Column]:
    return [_column(table, index, breaks) for index in range(len(table.header))]


def _column(table: Table, index: int, breaks: bool) -> Column:
    name, cells = table.header[index], [row[index] for row in table.rows]
    header = _broken(name, max((cell_len(cell) for cell in cells), default=0)) if breaks else name
    width = max(cell_len(line) for line in (*header.splitlines(), *cells))
    if name == "status":
        words = [cell_len(word) for cell in cells for word in cell.split()[:1]]
        width = max(min(width, _REASON), *words, cell_len(name))
    return Column(name, header, width)


def _broken(name: str, width: int) -> str:
    """``name`` in lines, where it is wider than its column's cells and has somewhere to break."""
    lines = [""]
    for piece in re.findall(r"[^._/ ]+[._/ ]*|[._/ ]+", name):
        if lines[-1] and cell_len(lines[-1] + piece.rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _total(columns: list[Column]) -> int:
    return 1 + sum(3 + column.width for column in columns)


def _drawn(table: Table, columns: list[Column], width: int) -> RichTable:
    drawn = RichTable(title=_TITLE, title_justify="left")
    room = width - _total(columns)  # the status may have it
    for column in columns:
        if column.name == "status":
            drawn.add_column(column.header, min_width=column.width, max_width=column.width + room, overflow="fold")
        else:
            drawn.add_column(column.header, width=column.width, justify="right", overflow="fold")
    kept = [table.header.index(column.name) for column in columns]
    for row in table.rows:
        drawn.add_row(*(row[index] for index in kept), style=None if row[-1] == "FINISHED" else "red")
    return drawn
