"""One process a folder."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lora_exp.machine import claims

HOLD = "import sys, pathlib; from lora_exp.machine.claims import claim; claim(pathlib.Path(sys.argv[1]), 'x'); print('has', flush=True); sys.stdin.read()"  # fmt: skip # noqa: E501


def test_a_folder_that_another_process_has_is_refused_until_it_ends(tmp_path: Path) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "has\n"
        for _ in range(2):  # a refusal takes nothing from the owner
            with pytest.raises(claims.FolderInUseError, match=rf"process {other.pid} .*hydra.run.dir=FOLDER"):
                claims.claim(tmp_path, "hydra.run.dir")
    finally:
        other.kill()
        other.communicate()
    with claims.claimed(tmp_path, "hydra.run.dir"):
        pass


def test_a_process_may_claim_twice_and_gives_back_once(tmp_path: Path) -> None:
    claims.claim(tmp_path, "x")
    with claims.claimed(tmp_path, "x"):
        pass
    assert tmp_path.resolve() in claims._mine
    claims.release_all()
    assert not claims._mine
    assert not (tmp_path / ".in_use.json").exists()
