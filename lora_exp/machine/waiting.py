"""How torch's threads wait for each other: briefly awake, then asleep.

OpenMP's threads spin for milliseconds at each barrier. On a machine that something else uses too, that is time stolen
from the very thread that is waited for. Asleep at once, small layers pay for being woken. So they spin for about as
long as it takes to fall asleep and be woken, and no longer. To be called before torch is loaded, which reads it once.
"""

from __future__ import annotations

import os

# Of GNU's library (torch's wheels), in turns of its loop, and of LLVM's and Intel's (some builds), in milliseconds.
_BRIEFLY = {"GOMP_SPINCOUNT": "3000", "KMP_BLOCKTIME": "1"}
WAITS = ("OMP_WAIT_POLICY", *_BRIEFLY)  # a user's own wish is one of these


def wait_briefly() -> None:
    """Set the wait for this process and those it starts, unless its environment has a wish of its own."""
    if not any(name in os.environ for name in WAITS):
        os.environ.update(_BRIEFLY)
