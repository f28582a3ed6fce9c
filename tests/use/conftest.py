"""Finished runs of tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., Any]
Train = Callable[..., Path]


@pytest.fixture
def train(cli: Cli, tiny_overrides: list[str], workplace: Path) -> Train:
    """Train by the command line into ``outputs/runs/day/NAME``, untracked unless asked otherwise."""

    def run(name: str = "one", *overrides: str, tracked: bool = False, overriding: list[str] | None = None) -> Path:
        folder = workplace / "outputs/runs/day" / name
        place = [f"hydra.run.dir={folder}", *([] if tracked else ["tracking=none"])]
        done = cli(*(overriding or tiny_overrides), "optimizer.lr=1e-2", *place, *overrides)
        assert done.code == 0, done.err
        return folder

    return run


@dataclass(frozen=True)
class Used:
    """What a task on finished runs printed, and its own folder."""

    out: str
    folder: Path

    @property
    def found(self) -> dict[str, Any]:
        """Its evaluation."""
        read: dict[str, Any] = json.loads((self.folder / "evaluation.json").read_text())
        return read

    @property
    def lines(self) -> dict[tuple[str, str, str], dict[str, float]]:
        """The evaluation's figures by (letter, way, data)."""
        return {(line["name"], line["way"], line["data"]): line["figures"] for line in self.found["lines"]}

    @property
    def answers(self) -> list[dict[str, Any]]:
        """What was generated."""
        return [json.loads(line) for line in (self.folder / "generated.jsonl").read_text().splitlines()]


@pytest.fixture
def use(cli: Cli, workplace: Path) -> Callable[..., Used]:
    """Call a task on finished runs, which must end well."""

    def run(*arguments: str) -> Used:
        before = set(workplace.glob("outputs/used/*/*"))
        done = cli(*arguments)
        assert done.code == 0, done.err + done.out
        (folder,) = set(workplace.glob("outputs/used/*/*")) - before
        return Used(done.out, folder)

    return run


@pytest.fixture
def result_of() -> Callable[[Path], dict[str, Any]]:
    """What a run found."""

    def read(folder: Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((folder / "result.json").read_text())["result"]
        return found

    return read
