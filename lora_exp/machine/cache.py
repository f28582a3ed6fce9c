"""Folders that are made once, whole or not at all, shared by processes that race for them, and checked at each use."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout

from lora_exp.errors import UserError

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"  # the SHA-256 of every other file of a folder
_PIECE = 2**24
_reader = ThreadPoolExecutor(1, thread_name_prefix="cache")
_being_read: dict[Path, Future[str | None]] = {}
_ELSEWHERE = "set LORA_EXP_CACHE=FOLDER (or model.cache_dir and data.cache_dir) to one that you may write, with room"


def cache_root(override: str | None = None) -> Path:
    """``override``, else $LORA_EXP_CACHE, else ``lora_exp`` in $XDG_CACHE_HOME (default ~/.cache)."""
    chosen = override or os.environ.get("LORA_EXP_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_exp"
    except RuntimeError as error:  # no HOME, and no entry in the list of users
        raise UserError(f"There is no home folder to keep a cache in ({error}): {_ELSEWHERE}") from error


def cache_folder(room: str, label: str | None, key: str, override: str | None = None) -> Path:
    """``room``/``label``-``key`` in the cache. Whatever the label holds, it never leads elsewhere."""
    name = re.sub(r"[^\w.-]+", "-", label or "").strip(".-")[:60]
    return cache_root(override) / room / (f"{name}-{key}" if name else key)


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make(temporary)`` if it is not there yet, or is not what was made then.

    Every file is read and compared with the hash taken when it was made. What is made comes into place by renaming:
    a reader never sees half of a file, a crash leaves nothing behind that looks finished, and of two
    processes the second waits and finds it done. Raises UserError where the cache cannot be written.
    """
    begun = _being_read.pop(folder, None)
    damage = begun.result() if begun else _damage(folder)
    if damage is None:
        return folder
    was_there = folder.is_symlink() or folder.exists()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            damage = _damage(folder)
            if damage is None:
                return folder
            if was_there := folder.is_symlink() or folder.exists():
                log.warning(f"{folder} is damaged ({damage}): it is made anew")
            _remove_abandoned(folder)
            _make(folder, make)
    except Exception as error:
        reason = _storage_problem(error, folder)
        if reason is None:
            raise
        what = f"{folder} is damaged ({damage}), and" if was_there else "The cache"
        raise UserError(f"{what} {folder.parent} cannot be written ({reason}): {_ELSEWHERE}") from error
    return folder


def read_early(folder: Path) -> None:
    """Begin to compare the files of ``folder`` in a thread, for the next ``made_once`` of it to wait for."""
    if folder.is_dir():
        _being_read[folder] = _reader.submit(_damage, folder)


def written_sha256(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a folder that ``made_once`` has just returned, by its path inside."""
    digests = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    return {str(name): str(digest) for name, digest in digests.items()}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        # Large pieces: a thread that hashes waits for the interpreter's lock between two, up to 5 ms each time.
        buffer = memoryview(bytearray(min(max(os.fstat(stream.fileno()).st_size, 1), _PIECE)))
        while read := stream.readinto(buffer):
            digest.update(buffer[:read])
    return digest.hexdigest()


def known_sha256(path: Path) -> str:
    """The same, read once a process as long as the file's time and size stay."""
    state = path.stat()
    return _known_sha256(path, state.st_ino, state.st_mtime_ns, state.st_size)


@functools.lru_cache(maxsize=1 << 16)
def _known_sha256(path: Path, inode: int, mtime_ns: int, size: int) -> str:
    del inode, mtime_ns, size
    return file_sha256(path)


def folder_sha256(folder: Path) -> str:
    """SHA-256 of the sorted lines "DIGEST  PATH", as ``sha256sum`` prints them, of a folder's files but hidden ones."""
    lines = [f"{file_sha256(folder / name)}  {name}\n" for name in _files(folder)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a folder; None if every file is what was written, and there is no other."""
    if not folder.is_dir():
        return "it is no folder"
    try:
        expected = written_sha256(folder)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return f"{MANIFEST} is not what was written"
    found = _files(folder)
    strange = sorted(set(expected) ^ set(found))
    if strange:
        return f"{strange[0]} is {'missing' if strange[0] in expected else 'not of it'}"
    return next((f"{name} is not what was written" for name in found if _digest(folder / name) != expected[name]), None)


def _files(folder: Path) -> list[str]:
    """The files of a folder by their paths inside, but the manifest, and those that systems hide in folders."""
    paths = [path for path in folder.rglob("*") if not path.name.startswith(".") and not path.is_dir()]
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {MANIFEST})


def _digest(file: Path) -> str | None:
    try:
        return file_sha256(file)
    except OSError:
        return None


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    temporary = folder.parent / f".{folder.name}.making-{secrets.token_hex(4)}"
    temporary.mkdir()  # not by tempfile, whose folders are their owner's alone
    mode = temporary.stat().st_mode & 0o777
    try:
        make(temporary)
        for path in temporary.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        digests = {name: file_sha256(temporary / name) for name in _files(temporary)}
        (temporary / MANIFEST).write_text(json.dumps({"sha256": digests}, indent=2) + "\n", encoding="utf-8")
        _install(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _install(temporary: Path, folder: Path) -> None:
    """Bring what was made into place; into a damaged folder file by file, so that nobody who reads there misses one."""
    if folder.is_symlink() or not folder.is_dir():
        folder.unlink(missing_ok=True)
        temporary.rename(folder)
        return
    wanted = [*_files(temporary), MANIFEST]
    for name in wanted:
        target = folder / name
        for above in reversed(target.relative_to(folder).parents):
            _clear(folder / above, keep_folder=True)
            (folder / above).mkdir(exist_ok=True)
        _clear(target, keep_folder=False)
        (temporary / name).replace(target)
    for name in set(_files(folder)) - set(wanted):
        (folder / name).unlink()


def _clear(path: Path, keep_folder: bool) -> None:
    """Remove a folder that stands where a file belongs, or a file where a folder does."""
    is_folder = path.is_dir() and not path.is_symlink()
    if is_folder and not keep_folder:
        shutil.rmtree(path)
    elif keep_folder and not is_folder:
        path.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed makers left beside ``folder``, whose lock is held: who makes holds his folder's lock."""
    own = re.compile(rf"\.{re.escape(folder.name)}\.(making-)?[a-z0-9_]{{8}}")
    for path in folder.parent.glob(".*"):
        owner, marked, _ = path.name[1:].rpartition(".making-")
        if own.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
        elif marked:
            with contextlib.suppress(Timeout, OSError), FileLock(f"{folder.parent / owner}.lock", timeout=0):
                shutil.rmtree(path, ignore_errors=True)


def _storage_problem(error: Exception, folder: Path) -> str | None:
    """The system's reason, where an error is about writing the cache and not about something that a maker reads."""
    if isinstance(error, OSError) and error.errno is not None:
        name = str(error.filename or "")
        about_cache = not name or folder.name in name or Path(name) in (folder, *folder.parents)
        return (f"{error.strerror}: {name}" if name else error.strerror) if about_cache else None
    if re.search(r"\(os error \d+\)", str(error)):  # safetensors, which is written in Rust
        return re.sub(r"\s+", " ", str(error))
    return None
