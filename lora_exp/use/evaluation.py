"""An evaluation as a table for a person, as files, and as figures of each run."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lora_exp.adapters.files.whole import write_text
from lora_exp.job import shown
from lora_exp.use.found import FoundRun
from lora_exp.use.loading import BASE, Trained

ADAPTED, MERGED = "adapted", "merged"
_WIDTH = 80
_TITLES = {"bits_per_byte": "bits/byte"}
_EQUAL = 1e-4  # nats: what another order of summing changes in float32


@dataclass(frozen=True)
class Line:
    """What one model found on ``rows`` of ``rows_of`` rows. ``way``: base, adapted or merged."""

    name: str
    way: str
    data: str
    split: str
    rows: int
    rows_of: int
    figures: Mapping[str, float]


@dataclass
class Evaluation:
    """``letters``: each run's name in tables; ``facts``: of the base."""

    runs: Mapping[str, FoundRun]
    letters: Mapping[str, str]
    facts: Mapping[str, Any]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    merged: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, trained: Trained) -> Evaluation:
        facts = {
            "base": trained.config.model.label,
            "base_files_sha256": trained.digest,
            "quantization": trained.config.quantization.name,
            "dtype": str(trained.place.dtype).removeprefix("torch."),
            "device": str(trained.place.device),
        }
        return cls(trained.runs, {name: _letter(place) for place, name in enumerate(trained.runs)}, facts)

    def note_merged(self, name: str, loss: float, most: float) -> None:
        """How far the merged model is from the adapted one: in the mean loss, and at most in a row (nats)."""
        self.merged[name] = {"loss_difference": loss, "largest_row_difference": most}
        letter = self.letters[name]
        if most == 0:
            self.notes.append(f"{letter} merged equals {letter} in every row")
            return
        near = "" if most <= _EQUAL else f", {self._why()}"
        self.notes.append(
            f"{letter} merged differs from {letter} by {loss:+.1e} in loss, {most:.1e} at most in a row{near}"
        )

    def _why(self) -> str:
        """What makes a merged model differ by more than the order of sums does."""
        dtype, stored = self.facts["dtype"], self.facts["quantization"]
        if stored != "none":
            return f"as merged weights are dense and no longer {stored}"
        return f"as merged weights are rounded to {dtype}" if dtype != "float32" else "more than rounding in float32"

    def show(self) -> None:
        """Print a table a dataset, and below them what is to be said."""
        terminal = Console()
        console = terminal if terminal.is_terminal else Console(width=_WIDTH)
        for name, run in self.runs.items():
            step = "" if run.at_step is None else f", step {run.at_step}"
            console.print(f"{self.letters[name]}  {_short(run)}{step}", markup=False, highlight=False)
        for table in self._tables():
            console.print(table, markup=False)
        for note in self.notes:
            console.print(note, markup=False, highlight=False)

    def write(self, folder: Path) -> list[Path]:
        """As JSON, CSV and Markdown. Returns the files."""
        files = [folder / f"evaluation.{suffix}" for suffix in ("json", "csv", "md")]
        for file, text in zip(files, (self._json(), self._csv(), self._markdown()), strict=True):
            write_text(file, text)
        return files

    def figures_of(self, run: FoundRun) -> dict[str, float]:
        """A run's figures by the names that MLflow has them under: ``evaluate/DATA/SPLIT/NAME``; the base's and the
        merged model's with ``base_`` and ``merged_`` before the name."""
        found: dict[str, float] = {}
        for line in self.lines:
            if line.way != BASE and self.runs[line.name] != run:
                continue
            before = "" if line.way == ADAPTED else f"{line.way}_"
            place = "/".join(re.sub(r"[^\w.-]+", "-", part) for part in (line.data, line.split))
            found |= {f"evaluate/{place}/{before}{name}": value for name, value in line.figures.items()}
        return found

    def objective(self) -> dict[str, float]:
        """The first run's figures on the data that was asked for; without a run the base's."""
        lines = [line for line in self.lines if line.way == (ADAPTED if self.runs else BASE)]
        return dict(lines[0].figures) if lines else {}

    def _parts(self) -> Iterator[tuple[str, list[Line]]]:
        for data, split in dict.fromkeys((line.data, line.split) for line in self.lines):
            lines = [line for line in self.lines if (line.data, line.split) == (data, split)]
            count = f"{lines[0].rows:,} of {lines[0].rows_of:,} rows"
            yield f"{data}, {split}: {count}", lines

    def _title(self, line: Line) -> str:
        if line.way == BASE:
            return BASE
        return self.letters[line.name] + (" merged" if line.way == MERGED else "")

    def _tables(self) -> Iterator[Table]:
        for title, lines in self._parts():
            table = Table(title=title, title_justify="left")
            table.add_column("model", no_wrap=True)
            names = _names(lines)
            for name in names:
                table.add_column(_TITLES.get(name, name), justify="right")
            for line in lines:
                table.add_row(self._title(line), *_cells(line, names))
            yield table

    def _json(self) -> str:
        runs = {
            self.letters[name]: {"run": str(run.place), "run_id": run.run_id, "step": run.at_step}
            for name, run in self.runs.items()
        }
        lines = [{**asdict(line), "name": self.letters.get(line.name, BASE)} for line in self.lines]
        merged = {self.letters[name]: found for name, found in self.merged.items()}
        found = {**self.facts, "runs": runs, "lines": lines, "merged": merged, "notes": self.notes}
        return json.dumps(found, indent=2) + "\n"

    def _csv(self) -> str:
        names, stream = _names(self.lines), io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["model", "run", "step", "data", "split", "rows", *names])
        for line in self.lines:
            run = self.runs.get(line.name)
            place = [str(run.place), run.at_step] if run is not None else ["", ""]
            figures = [line.figures.get(name, "") for name in names]
            writer.writerow([line.way, *place, line.data, line.split, line.rows, *figures])
        return stream.getvalue()

    def _markdown(self) -> str:
        text = "".join(f"- {self.letters[name]}: `{run.place}`\n" for name, run in self.runs.items())
        for title, lines in self._parts():
            names = _names(lines)
            rows = [["model", *(_TITLES.get(name, name) for name in names)], ["---"] + ["---:"] * len(names)]
            rows += [[self._title(line), *_cells(line, names)] for line in lines]
            text += f"\n{title}\n\n" + "".join(f"| {' | '.join(row)} |\n" for row in rows)
        return text + "".join(f"\n{note}\n" for note in self.notes)


def _letter(place: int) -> str:
    """A, B, …, Z, A1, …"""
    return chr(65 + place % 26) + (str(place // 26) if place > 25 else "")


def _short(run: FoundRun) -> str:
    """Where it lies, as seen from here if it is below."""
    place = run.folder or run.adapter
    return str(place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place)


def _names(lines: Sequence[Line]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line.figures))


def _cells(line: Line, names: Sequence[str]) -> list[str]:
    return [_cell(name, line.figures[name]) if name in line.figures else "" for name in names]


def _cell(name: str, value: float) -> str:
    return f"{value:.4f}" if name == "loss" else shown(value)
