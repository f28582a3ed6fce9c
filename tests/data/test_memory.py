"""Tokenising holds pieces, not the text: the process needs hardly more memory for eight times as much of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
from transformers import AutoTokenizer
from lora_exp.data.kinds.text import Text
from lora_exp.data.text import load_blocks
section = Text(label="t", path=sys.argv[1], cache_dir=sys.argv[3])
blocks = load_blocks(section, AutoTokenizer.from_pretrained(sys.argv[2]))
print(len(blocks.train), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is Linux's")
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_does_not_grow_with_the_text(tiny_llama: Path, tmp_path: Path, suffix: str) -> None:
    found = []
    for count in (1, 8):
        file = tmp_path / f"{count}{suffix}"
        with file.open("w") as stream:
            for index in range(count * 1000):
                line = f"{index} And the king said unto the people, go thou and sing. " * 18
                stream.write(json.dumps({"text": line}) + "\n" if suffix == ".jsonl" else line + "\n")
        arguments = [sys.executable, "-c", PROGRAM, str(file), str(tiny_llama), str(tmp_path / "cache")]
        done = subprocess.run(arguments, capture_output=True, text=True, check=True, env={**os.environ})
        found.append([int(figure) for figure in done.stdout.split()[-2:]])
    (few, small), (many, large) = found
    assert many > 7 * few
    assert large - small < 150 * 1024, f"{small / 1024:.0f} MiB for 1 MB, {large / 1024:.0f} MiB for 8 MB"
