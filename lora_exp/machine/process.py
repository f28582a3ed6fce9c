"""Which process did something, said so that a later one can tell whether it still lives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """``started`` tells it from a later process with the same number; ``space`` is the boot and the space of numbers
    (a container's own) in which ``pid`` has its meaning."""

    host: str
    pid: int
    started: str
    space: str

    @classmethod
    def mine(cls) -> Process:
        return cls(socket.gethostname(), os.getpid(), _started(os.getpid()) or "", _space())

    @classmethod
    def read(cls, text: str) -> Process | None:
        """What ``str`` of one gave, or None for anything else."""
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError):
            return None

    def __str__(self) -> str:
        return json.dumps(asdict(self))

    def is_gone(self) -> bool:
        """Whether it is sure to have ended. Another host's, or another container's, never is."""
        if (self.host, self.space) != (socket.gethostname(), _space()) or not self.started:
            return False
        return _started(self.pid) != self.started


def _space() -> str:
    """Empty where the system does not tell; then the host's name alone must do."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115  # no path, but a name
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """When the process began, in the system's own words; None if there is none, or only what is left of one."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else rest[18]
    except OSError:
        return None if Path("/proc/self/stat").exists() else _started_by_ps(pid)


def _started_by_ps(pid: int) -> str | None:
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    except OSError:
        return ""  # it cannot be known
    return done.stdout.strip() or None
