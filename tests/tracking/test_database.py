"""MLflow's SQLite file is there whole or not at all, and where it should be."""

from __future__ import annotations

import os
import shutil
import sqlite3
import time
from pathlib import Path

import pytest
import sqlalchemy
from mlflow.tracking import MlflowClient

from lora_exp.config import TrackingConfig
from lora_exp.tracking import database
from lora_exp.tracking.mlflow import open_run


class Cut(BaseException):
    """Stands for the end of the process."""


def build(address: str) -> None:
    MlflowClient(address).search_experiments()


def build_until(statement: int, address: str) -> None:
    """Build, but for what comes after so many statements."""
    seen = 0

    def count(*_: object) -> None:
        nonlocal seen
        seen += 1
        if seen == statement:
            raise Cut

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "before_cursor_execute", count)
    try:
        with pytest.raises(Cut):
            build(address)
    finally:
        sqlalchemy.event.remove(sqlalchemy.engine.Engine, "before_cursor_execute", count)


def tables(file: Path) -> set[str]:
    with sqlite3.connect(file) as connection:
        found = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    connection.close()
    return found


@pytest.mark.parametrize("statement", [40, 300])
def test_a_building_that_is_cut_off_leaves_nothing(statement: int, workplace: Path) -> None:
    file = workplace / "mlflow.db"
    with pytest.raises(Cut):
        database.ensure(file, lambda address: (build_until(statement, address), (_ for _ in ()).throw(Cut))[0])
    assert not [path.name for path in workplace.glob("*mlflow.db*") if not path.name.endswith(".lock")]


@pytest.mark.parametrize("statement", [45, 400])
def test_what_an_older_version_left_half_built_is_set_aside(
    statement: int, workplace: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = workplace / "outputs/mlflow.db"
    file.parent.mkdir()
    broken = workplace / "another process.db"  # in this one, a connection would outlive the file's new name
    build_until(statement, f"sqlite:///{broken}")
    shutil.copy(broken, file)
    os.utime(file, (time.time() - 60,) * 2)
    with pytest.raises(Exception, match=r"already exists|duplicate column"):  # that is what it used to say
        MlflowClient(f"sqlite:///{broken}").search_experiments()
    with open_run(TrackingConfig(), "first") as run:
        pass
    assert MlflowClient(database.address(file)).get_run(run.run_id).info.status == "FINISHED"
    assert "half built" in caplog.text
    assert list(file.parent.glob("mlflow.db.half-built-*"))


def test_stale_temporaries_are_removed(workplace: Path, empty_database: Path) -> None:
    stale = workplace / ".mlflow.db.new-abc"
    stale.mkdir()
    (stale / "building.db").write_text("half")
    database.ensure(workplace / "mlflow.db", lambda address: shutil.copy(empty_database, database.file_of(address)))
    assert not stale.exists()
    assert "spans" in tables(workplace / "mlflow.db")


def test_other_files_are_left_alone(workplace: Path, empty_database: Path) -> None:
    """A whole database, another program's, and what is no database."""
    other, whole, text = workplace / "other.db", workplace / "whole.db", workplace / "text.db"
    with sqlite3.connect(other) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    shutil.copy(empty_database, whole)
    text.write_text("no database at all, " * 100)
    for file in (other, whole, text):
        before = file.read_bytes()
        database.ensure(file, lambda address: pytest.fail(f"builds {address}"))
        assert file.read_bytes() == before


@pytest.mark.parametrize("name", ["what?", "25%20", "a?b=c"])
def test_an_address_names_its_file_and_no_other(
    name: str, workplace: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old tests stood in folders with plain names alone, where a path and its address are the same text."""
    place = workplace / "place"
    folder = place / name
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    database.ensure(folder / "x.db", lambda address: shutil.copy(empty_database, database.file_of(address)))
    engine = sqlalchemy.create_engine(database.address(folder / "x.db"))
    assert "spans" in sqlalchemy.inspect(engine).get_table_names()
    engine.dispose()
    assert {path.name for path in place.rglob("*")} <= {name, "x.db", "x.db.lock"}
    monkeypatch.chdir(workplace)
    with pytest.raises(ValueError, match="rename that folder"):
        database.address(folder / "x.db")


def test_an_address_and_its_file() -> None:
    assert database.file_of("sqlite:////a/b.db") == Path("/a/b.db")
    assert database.file_of("sqlite:////a/b.db?timeout=5") == Path("/a/b.db")
    for other in ("http://host", "sqlite://", "sqlite:///:memory:", "postgresql://host/db"):
        assert database.file_of(other) is None


@pytest.mark.parametrize(
    "uri", ["sqlite:///x.db", "http://127.0.0.1:1", "file:///x", "databricks", "mssql+pyodbc://x/y"]
)
def test_only_servers_with_locks_are_asked_for_one(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlalchemy, "create_engine", lambda *_, **__: pytest.fail("asked"))
    with database.one_at_a_time(uri):
        pass


@pytest.mark.parametrize("uri", ["postgresql://nobody@127.0.0.1:1/x", "mysql+pymysql://nobody@127.0.0.1:1/x"])
def test_a_server_that_is_away_or_has_no_driver_is_left_to_mlflow(uri: str) -> None:
    with database.one_at_a_time(uri):
        pass
