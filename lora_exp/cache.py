"""Folders that are made once, whole or not at all, and shared by processes that race for them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


def cache_root(override: str | None = None) -> Path:
    """``override``, else $LORA_EXP_CACHE, else ``lora_exp`` in $XDG_CACHE_HOME (default ~/.cache)."""
    if override or os.environ.get("LORA_EXP_CACHE"):
        return Path(override or os.environ["LORA_EXP_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_exp"


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """``folder``, filled by ``make(temporary)`` if it is not there yet.

    The temporary folder is renamed into place when it is complete: a reader never sees half of it, a crash
    leaves nothing behind that looks finished, and of two processes the second waits and finds it done.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.is_dir():
            return folder
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            make(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    return folder


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256(path)


def remembered_sha256(path: Path) -> str:
    """``file_sha256``, kept by path, size and time, so that a large file is hashed once."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:32]

    def hash_into(folder: Path) -> None:
        (folder / "sha256.json").write_text(json.dumps({"file": str(path), "sha256": file_sha256(path)}))

    kept = made_once(cache_root() / "sha256" / key, hash_into)
    return str(json.loads((kept / "sha256.json").read_text())["sha256"])


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no hashlib.file_digest
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
