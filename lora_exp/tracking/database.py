"""MLflow's database: a SQLite file's address, and the making of its tables, whole or not at all and by one process.

MLflow makes its schema by dozens of migrations that each commit. A process that ends among them leaves a file that no
later run can open, so the schema is made in a temporary folder and renamed into place under a lock. Two processes that
make it on one PostgreSQL or MySQL both fail: there the lock is the server's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import FileLock

from lora_exp.errors import UserError

log = logging.getLogger(__name__)
_PREFIX = "sqlite:///"
_ROOM_BYTES = 1 << 17  # an update of a run, with SQLite's journal
_SIGNS = "?%"
_FIRST_TABLES = {"experiments", "alembic_version"}
_AT_WORK_S = 10.0  # a half-built file that was changed since may be another program's at this moment
_LOCKS = {  # held by a connection, and gone with it
    "postgresql": f"SELECT pg_advisory_lock({int.from_bytes(b'lora_exp') >> 1})",
    "mysql": "SELECT GET_LOCK('lora_exp', 600)",
}


def address(file: Path) -> str:
    """The SQLAlchemy address of ``file``. It has no way to write a ``?``, which begins its options, and newer versions
    decode ``%20``: a path with one of them is given as seen from the current folder."""
    path = str(file.resolve())
    if any(sign in path for sign in _SIGNS):
        path = os.path.relpath(path)
    if any(sign in path for sign in _SIGNS):
        raise UserError(f"{file} cannot be a database's address, because of the ? or % in it: rename that folder")
    return _PREFIX + path


def file_of(uri: str) -> Path | None:
    """The file behind a SQLite address; None for other addresses and for a database in memory."""
    path = uri.removeprefix(_PREFIX).partition("?")[0]
    return Path(path).resolve() if uri.startswith(_PREFIX) and path not in ("", ":memory:") else None


def ensure(file: Path, build: Callable[[str], object]) -> None:
    """Make ``file`` by ``build(address)`` if it is not there yet, or is what an interrupted building left."""
    if _is_whole(file):
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{file}.lock"):
        _remove_stale(file)
        if _is_whole(file):
            return
        _set_aside(file)
        temporary = Path(tempfile.mkdtemp(prefix=_stale_prefix(file), dir=file.parent))
        try:
            build(address(temporary / "building.db"))
            _copy(temporary / "building.db", temporary / "whole.db")
            if not file.exists() or not file.stat().st_size:  # a server started meanwhile may have made it
                (temporary / "whole.db").replace(file)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def one_at_a_time(uri: str) -> Iterator[None]:
    """Wait for other processes that look for or make the tables of the database server at ``uri``.

    Nothing for other addresses, nor where the server cannot be reached or the driver is missing: MLflow says so better.
    """
    lock = _LOCKS.get(uri.partition(":")[0].partition("+")[0])
    with contextlib.ExitStack() as stack:
        if lock is not None:
            import sqlalchemy

            with contextlib.suppress(sqlalchemy.exc.SQLAlchemyError, ImportError):
                engine = sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, isolation_level="AUTOCOMMIT")
                stack.enter_context(engine.connect()).execute(sqlalchemy.text(lock))
        yield


@contextlib.contextmanager
def room_to_close(file: Path | None) -> Iterator[Callable[[], None]]:
    """Hold back a little room beside ``file`` and yield what gives it free: a full disk must not keep a run from being
    marked as failed. The room has no name, so that it goes with the process, however that ends."""
    if file is None:
        yield lambda: None
        return
    with tempfile.TemporaryFile(dir=file.parent) as held:
        held.write(b"\0" * _ROOM_BYTES)
        held.flush()
        yield held.close


def _is_whole(file: Path) -> bool:
    return file.is_file() and file.stat().st_size > 0 and not _is_half_built(file)


def _is_half_built(file: Path) -> bool:
    """Whether it is MLflow's but holds not one experiment: one is put in when the last table is made."""
    try:
        with contextlib.closing(
            sqlite3.connect(file.absolute().as_uri() + "?mode=rw", uri=True, timeout=20)
        ) as database:
            tables = {name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type='table'")}
            if tables and not tables & _FIRST_TABLES:
                return False  # something else's
            filled = tables & {"experiments", "runs"}
            return not any(database.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in filled)
    except sqlite3.DatabaseError:  # not a database, or locked: MLflow says so better
        return False


def _set_aside(file: Path) -> None:
    """Keep what an interrupted building left under another name, once nobody can be at work on it."""
    if not file.exists() or not file.stat().st_size:
        return
    while time.time() - file.stat().st_mtime < _AT_WORK_S:
        time.sleep(0.2)
        if _is_whole(file):
            return
    kept = file.with_name(f"{file.name}.half-built-{int(time.time())}")
    file.rename(kept)
    for rest in ("-journal", "-wal", "-shm"):
        file.with_name(file.name + rest).unlink(missing_ok=True)
    log.warning("%s was left half built by an interrupted start: it is made anew (the old one is %s)", file, kept.name)


def _copy(built: Path, whole: Path) -> None:
    """A file that no connection of the builder's has open."""
    with contextlib.closing(sqlite3.connect(built)) as source, contextlib.closing(sqlite3.connect(whole)) as target:
        source.backup(target)


def _remove_stale(file: Path) -> None:
    for folder in file.parent.glob(f"{_stale_prefix(file)}*"):
        shutil.rmtree(folder, ignore_errors=True)


def _stale_prefix(file: Path) -> str:
    return f".{file.name}.new-"
