"""How OpenMP's threads wait: set before torch is loaded, unless the user has a wish."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from lora_exp.machine.waiting import WAITS, wait_briefly


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in WAITS})


@pytest.mark.usefixtures("unset")
def test_threads_wait_briefly() -> None:
    wait_briefly()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0


@pytest.mark.usefixtures("unset")
@pytest.mark.parametrize("name", WAITS)
def test_a_users_wish_is_left_alone(name: str) -> None:
    os.environ[name] = "PASSIVE"
    before = dict(os.environ)
    wait_briefly()
    assert dict(os.environ) == before


def test_the_command_sets_it_before_torch_is_loaded() -> None:
    code = (
        "import os, sys, lora_exp.__main__; assert 'torch' not in sys.modules; import torch; "
        "print(os.environ['GOMP_SPINCOUNT'])"
    )
    clean = {key: value for key, value in os.environ.items() if key not in WAITS}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True)
    assert int(done.stdout) > 0
