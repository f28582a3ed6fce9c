"""Where a result came from: git revision and library versions."""

from __future__ import annotations

import subprocess
from importlib import metadata

from lora_exp.credentials import redacted as redacted

LIBRARIES = ("lora_exp", "torch", "transformers", "datasets", "peft", "hydra-core", "mlflow")


def provenance_tags() -> dict[str, str]:
    """``version.*`` of every library that matters, ``git.revision`` and ``git.dirty`` of the current folder."""
    tags = {f"version.{name}": version for name in LIBRARIES if (version := _version(name))}
    revision = _git("rev-parse", "HEAD")
    if revision:
        tags["git.revision"] = revision
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
