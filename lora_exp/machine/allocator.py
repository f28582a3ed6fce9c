"""How the C library keeps memory that was freed: ready for the next step.

glibc hands large freed blocks back to the system at once and asks for them again in the next layer: a step of a small
model makes 27,000 page faults so, each of which clears 4 KiB. A training step wants the same blocks as the one before.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt(3)
_FROM_THE_HEAP = 64 << 20  # bytes of a block: up to here it is reused; a chunk of the loss head's logits has 32 MiB
_KEPT = 512 << 20  # bytes that may lie free at the heap's end
WISHES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory() -> bool:
    """For this process, if its C library is glibc and its environment has no wish of its own. Whether it was done."""
    if not sys.platform.startswith("linux") or any(name in os.environ for name in WISHES):
        return False
    with contextlib.suppress(OSError, AttributeError):  # another C library
        library = ctypes.CDLL(None)
        if hasattr(library, "gnu_get_libc_version"):
            return bool(library.mallopt(_MMAP_THRESHOLD, _FROM_THE_HEAP) and library.mallopt(_TRIM_THRESHOLD, _KEPT))
    return False
