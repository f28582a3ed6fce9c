"""Peak memory of one job, not of the process that may have run others before it."""

from __future__ import annotations

import gc
import re
import resource
import sys
from pathlib import Path

import torch

_GIB = 2**30


def reset_peak(device: torch.device) -> None:
    """Start a new peak: the CUDA allocator's, or (on Linux) the process's resident memory."""
    gc.collect()  # a job before this one may have left its model in a cycle
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to what is resident now
    except OSError:
        return  # not Linux, or not allowed: the peak is then the process's since it started


def peak_gib(device: torch.device) -> float:
    """The peak since ``reset_peak``, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GIB
    try:
        peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        peak = None
    if peak:
        return int(peak[1]) * 1024 / _GIB
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
