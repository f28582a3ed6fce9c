"""Where a result came from: git revision and library versions."""

from __future__ import annotations

import subprocess
from importlib import metadata

from lora_exp.credentials import redacted as redacted

LIBRARIES = ("lora_exp", "torch", "transformers", "datasets", "peft", "hydra-core", "mlflow")


def provenance_tags() -> dict[str, str]:
    """``version.*`` of every library that matters, ``git.revision`` and ``git.dirty`` of the current folder."""
    tags = {f"version.{name}": version for name, version in library_versions().items()}
    revision = _git("rev-parse", "HEAD")
    if revision:
        tags["git.revision"] = revision
        tags["git.dirty"] = str(bool(_git("status", "--porcelain", "--untracked-files=no"))).lower()
    return tags


def library_versions() -> dict[str, str]:
    """Those of ``LIBRARIES`` that are installed, with their versions."""
    return {name: version for name in LIBRARIES if (version := _version(name))}


def git_facts() -> dict[str, str]:
    """``commit``, ``branch`` and ``repoURL`` (without a login) of the current folder's repository, if it has one."""
    asked = {
        "commit": ("rev-parse", "HEAD"),
        "branch": ("rev-parse", "--abbrev-ref", "HEAD"),
        "repoURL": ("remote", "get-url", "origin"),
    }
    facts = {name: redacted(_git(*command) or "") for name, command in asked.items()}
    return {name: value for name, value in facts.items() if value}


def versions() -> str:
    """One line: this package, Python, and the libraries beside it, without importing any."""
    import platform

    from lora_exp import __version__

    beside = [f"{name} {version}" for name in LIBRARIES[1:] if (version := _version(name))]
    return f"lora_exp {__version__} (Python {platform.python_version()}, {', '.join(beside)})"


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
