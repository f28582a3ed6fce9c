"""The cache: what is read is what was written, or it is made anew; what cannot be made says where else to put it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from lora_exp.machine.cache import MANIFEST, cache_folder, cache_root, made_once, read_early, written_sha256

CONTENT = {"weights.bin": b"w" * 4096, "config.json": b'{"a": 1}', "deep/rows.arrow": b"rows" * 99}


def make(folder: Path) -> None:
    (folder / "deep").mkdir()
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)


def content(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != MANIFEST]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def _flip(file: Path) -> None:
    before = file.stat()
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    file.write_bytes(raw)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # no time stamp tells


def _directory(file: Path) -> None:
    file.unlink()
    (file / "inside").mkdir(parents=True)


def _unlisted(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["sha256"].pop("weights.bin")
    (folder / MANIFEST).write_text(json.dumps(manifest))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "one bit of the weights": lambda f: _flip(f / "weights.bin"),
    "weights zeroed": lambda f: (f / "weights.bin").write_bytes(bytes(4096)),
    "weights random": lambda f: (f / "weights.bin").write_bytes(os.urandom(4096)),
    "weights truncated": lambda f: os.truncate(f / "weights.bin", 100),
    "weights longer": lambda f: os.truncate(f / "weights.bin", 5000),
    "weights empty": lambda f: os.truncate(f / "weights.bin", 0),
    "weights missing": lambda f: (f / "weights.bin").unlink(),
    "weights a directory": lambda f: _directory(f / "weights.bin"),
    "weights a dangling link": lambda f: ((f / "weights.bin").unlink(), (f / "weights.bin").symlink_to("nowhere")),
    "one bit of the rows": lambda f: _flip(f / "deep/rows.arrow"),
    "rows zeroed": lambda f: (f / "deep/rows.arrow").write_bytes(bytes(396)),
    "rows' folder missing": lambda f: shutil.rmtree(f / "deep"),
    "rows' folder a file": lambda f: (shutil.rmtree(f / "deep"), (f / "deep").touch()),
    "config no JSON": lambda f: (f / "config.json").write_text("{"),
    "another file beside them": lambda f: (f / "adapter_config.json").write_text("{}"),
    "manifest missing": lambda f: (f / MANIFEST).unlink(),
    "manifest no JSON": lambda f: (f / MANIFEST).write_bytes(b"\xff\x00"),
    "manifest another JSON": lambda f: (f / MANIFEST).write_text("[1]"),
    "manifest one short": _unlisted,
    "manifest a directory": lambda f: _directory(f / MANIFEST),
    "folder empty": lambda f: (shutil.rmtree(f), f.mkdir()),
    "folder a file": lambda f: (shutil.rmtree(f), f.write_text("x")),
    "folder a dangling link": lambda f: (shutil.rmtree(f), f.symlink_to("nowhere")),
    "lock not empty": lambda f: (_flip(f / "weights.bin"), Path(f"{f}.lock").write_bytes(b"\x00" * 9)),
    "lock missing": lambda f: (_flip(f / "weights.bin"), Path(f"{f}.lock").unlink()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_noticed_said_and_made_anew(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = made_once(tmp_path / "thing", make)
    DAMAGES[damage](folder)
    made_once(folder, make)
    assert content(folder) == CONTENT
    (said,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert str(folder) in said
    assert "anew" in said
    made_once(folder, lambda _: pytest.fail("made a third time"))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_what_is_whole_is_not_made_again_and_its_hashes_are_at_hand(tmp_path: Path) -> None:
    import hashlib

    folder = made_once(tmp_path / "thing", make)
    made_once(folder, lambda _: pytest.fail("made again"))
    assert written_sha256(folder) == {name: hashlib.sha256(raw).hexdigest() for name, raw in CONTENT.items()}


@pytest.mark.parametrize("damaged", [False, True])
def test_what_is_read_early_counts_once(tmp_path: Path, damaged: bool, caplog: pytest.LogCaptureFixture) -> None:
    folder = made_once(tmp_path / "thing", make)
    if damaged:
        _flip(folder / "weights.bin")
    read_early(folder)
    made_once(folder, make)
    assert ("damaged" in caplog.text) == damaged
    assert content(folder) == CONTENT
    _flip(folder / "weights.bin")
    made_once(folder, make)
    assert content(folder) == CONTENT
    read_early(tmp_path / "nothing")


def test_a_half_made_folder_is_never_seen(tmp_path: Path) -> None:
    def broken(folder: Path) -> None:
        (folder / "half").touch()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        made_once(tmp_path / "thing", broken)
    assert not list(tmp_path.glob("*thing*/"))
    made_once(tmp_path / "thing", lambda folder: (folder / "whole").touch())
    assert sorted(content(tmp_path / "thing")) == ["whole"]


def test_what_readers_hold_open_outlives_a_remake(tmp_path: Path) -> None:
    """Each path leads to a whole file at any moment, and an old one that is mapped stays as it was."""
    import mmap

    folder = made_once(tmp_path / "thing", make)
    with (folder / "weights.bin").open("rb") as stream:
        mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    stop, missed = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            try:
                (folder / "weights.bin").read_bytes()
            except OSError as error:
                missed.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(30):
        _flip(folder / "config.json")
        made_once(folder, make)
    stop.set()
    reader.join()
    assert missed == []
    assert mapped[:] == CONTENT["weights.bin"]


def _killed(folder: str) -> None:
    def slow(temporary: Path) -> None:
        (temporary / "big").write_bytes(bytes(1000))
        time.sleep(60)

    made_once(Path(folder), slow)


def test_what_a_killed_maker_left_goes_with_the_next_whatever_it_makes(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    maker = context.Process(target=_killed, args=(str(tmp_path / "thing"),))
    maker.start()
    while not list(tmp_path.glob(".thing*/big")):
        time.sleep(0.01)
    made_once(tmp_path / "other", make)
    assert list(tmp_path.glob(".thing*/big")), "its maker is alive"
    assert maker.pid
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    (tmp_path / ".thing.ab12_xyz").mkdir()  # as earlier versions called theirs
    made_once(tmp_path / "another", make)
    assert not list(tmp_path.glob(".thing*/big"))
    made_once(tmp_path / "thing", make)
    assert list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_modes_are_those_that_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    def private(folder: Path) -> None:
        make(folder)
        (folder / "weights.bin").chmod(0o600)  # as safetensors writes

    before = os.umask(umask)
    try:
        folder = made_once(tmp_path / "thing", private)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (folder, *folder.rglob("*"))}
    folders = {"thing", "deep"}
    assert modes == {name: (0o777 if name in folders else 0o666) & ~umask for name in modes}
    assert stat.S_IMODE(Path(f"{folder}.lock").stat().st_mode) & ~umask == stat.S_IMODE(
        Path(f"{folder}.lock").stat().st_mode
    )


@pytest.mark.parametrize("label", ["../../../x", "/etc/x", "..", ".", "a/b", "a\\b\0c", "x" * 400, "", None, "ä ~"])
def test_a_label_never_leads_out_of_the_cache(tmp_path: Path, label: str | None) -> None:
    folder = cache_folder("datasets", label, "0123", str(tmp_path))
    assert folder.parent == tmp_path / "datasets"
    made_once(folder, make)
    assert folder.resolve().parent == (tmp_path / "datasets").resolve()
    assert folder.name.endswith("0123")


def test_a_plain_label_is_the_folders_name(tmp_path: Path) -> None:
    assert cache_folder("models", "smollm2_135m", "ab12", str(tmp_path)).name == "smollm2_135m-ab12"


def test_the_cache_can_be_put_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORA_EXP_CACHE", "/env")
    assert cache_root() == Path("/env")
    assert cache_root(str(tmp_path)) == tmp_path
    monkeypatch.delenv("LORA_EXP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/lora_exp")


def test_without_a_home_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LORA_EXP_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def homeless(*_: object) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(ValueError, match=r"home.*LORA_EXP_CACHE=FOLDER"):
        cache_root()


def _raise(error: Exception) -> Callable[[Path], None]:
    def fail(folder: Path) -> None:
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(28, os.strerror(28)), "No space left on device"),
        (OSError(30, os.strerror(30)), "Read-only file system"),
        (RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left"),
    ],
)
def test_a_cache_that_cannot_be_written_names_the_way_out(tmp_path: Path, error: Exception, says: str) -> None:
    with pytest.raises(ValueError, match=rf"{says}.*LORA_EXP_CACHE=FOLDER"):
        made_once(tmp_path / "thing", _raise(error))


def test_a_cache_below_a_file_and_a_lock_that_is_none_name_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "home").touch()
    with pytest.raises(ValueError, match=r"LORA_EXP_CACHE=FOLDER"):
        made_once(tmp_path / "home/lora_exp/models/thing", make)
    (tmp_path / "thing.lock").mkdir()
    with pytest.raises(ValueError, match=r"thing.lock.*LORA_EXP_CACHE=FOLDER"):
        made_once(tmp_path / "thing", make)


def test_a_damaged_folder_that_cannot_be_made_anew_is_called_damaged(tmp_path: Path) -> None:
    folder = made_once(tmp_path / "thing", make)
    _flip(folder / "weights.bin")
    with pytest.raises(ValueError, match=r"thing is damaged \(weights.bin .*No space left.*LORA_EXP_CACHE="):
        made_once(folder, _raise(OSError(28, os.strerror(28))))
    assert content(folder).keys() == CONTENT.keys()


def test_a_file_that_a_maker_cannot_read_is_not_called_the_cache(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        made_once(tmp_path / "cache/thing", lambda _: (tmp_path / "source").read_bytes())


RACE = """
import sys, time
from pathlib import Path
from lora_exp.machine.cache import made_once
def make(folder):
    (folder / "one").write_text("1")
    time.sleep(0.3)
    print("made")
made_once(Path(sys.argv[1]), make)
"""


def test_of_racing_processes_one_mends(tmp_path: Path) -> None:
    folder = made_once(tmp_path / "thing", lambda temporary: (temporary / "one").write_text("1"))
    (folder / "one").write_text("2")
    program = [sys.executable, "-c", RACE, str(folder)]
    with FileLock(f"{folder}.lock"):
        racers = [subprocess.Popen(program, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        time.sleep(0.2)
    outputs = [racer.communicate(timeout=60)[0] for racer in racers]
    assert sorted(outputs) == ["", "made\n"]
    assert (folder / "one").read_text() == "1"
