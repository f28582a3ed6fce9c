"""llama.cpp at work on a file: that it ends."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

_OPEN_AND_CLOSE = """
import sys
from pathlib import Path
from lora_exp.export.gguf.runtime import Llama
for _ in range(30):
    with Llama(Path(sys.argv[1])):
        pass
"""


def test_one_that_is_closed_at_once_ends(tiny: Callable[..., torch.nn.Module], written: Callable[..., Path]) -> None:
    """Its thread that was told to end before it had begun would be waited for, and never end."""
    pytest.importorskip("xllamacpp")
    command = [sys.executable, "-c", _OPEN_AND_CLOSE, str(written(tiny("llama")))]
    done = subprocess.run(command, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
