"""Where data come from, as tracking lists it, and what a run says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import PackagedConfig
from lora_exp.data.kind import Data
from lora_exp.data.kinds.images import Images
from lora_exp.data.kinds.text import Text
from lora_exp.data.origin import data_facts, record_data
from lora_exp.tracking.mlflow import NoRun


def test_the_digest_is_of_the_content_and_not_of_its_place(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder in (one, other):
        folder.mkdir()
        (folder / "a.txt").write_text("hello")
    rows = {"train": 5, "validation": 1}
    first, second = (data_facts(Text(label="x", path=str(folder)), rows, "") for folder in (one, other))
    assert [facts["digest"] for facts in first] == [facts["digest"] for facts in second]
    assert first[0]["digest"] != first[1]["digest"]
    assert [facts["context"] for facts in first] == ["training", "validation"]
    assert json.loads(first[1]["source"]) == {"path": str(one), "held out for validation": 0.05}
    (other / "a.txt").write_text("hallo")
    assert data_facts(Text(label="x", path=str(other)), rows, "")[0]["digest"] != first[0]["digest"]


def test_each_split_has_its_own_source(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.txt").write_text(name)
    paths = {key: str(tmp_path / f"{name}.txt") for key, name in (("path", "a"), ("validation_path", "b"))}
    section = Text(label="x", test_path=str(tmp_path / "c.txt"), **paths)
    facts = data_facts(section, {"train": 5, "validation": 1, "test": 2}, "")
    assert [json.loads(each["source"])["path"][-5:] for each in facts] == ["a.txt", "b.txt", "c.txt"]
    assert len({each["digest"] for each in facts}) == 3
    assert [json.loads(each["profile"]) for each in facts] == [{"rows": 5}, {"rows": 1}, {"rows": 2}]


def test_a_kind_that_finds_its_data_by_itself_is_listed_too() -> None:
    section = Images(label="x", packaged=PackagedConfig("d", "1", "f", "ab" * 32))
    (facts,) = data_facts(section, {"train": 5}, "")
    assert (facts["source_type"], len(facts["digest"])) == ("package", 16)
    assert json.loads(facts["source"]) == {"package": "d==1", "file": "f"}


@pytest.mark.parametrize("is_terminal", [False, True])
def test_what_a_person_must_hear_is_said(
    caplog: pytest.LogCaptureFixture, capsys: Any, monkeypatch: pytest.MonkeyPatch, is_terminal: bool
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: is_terminal)
    rows: Any = [1, 2, 3]
    data = Data(rows, rows[:1], "rows", test=rows[:2], said=["one is left out"], example="\x1b[2masked\x1b[0m answered")
    with caplog.at_level("INFO"):
        record_data(NoRun(), Images(label="x"), data)
    assert "data   x: 3 training, 1 validation and 2 test rows" in caplog.text
    assert "data   one is left out" in caplog.text
    shown = caplog.text + capsys.readouterr().out
    assert ("row    \x1b[2masked" in shown) == is_terminal
    assert ("row    ‹asked› answered" in shown) != is_terminal
