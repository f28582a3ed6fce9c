"""The wheel in an empty folder: it carries its config, its console script's module and nothing of the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def unpacked_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def test_the_wheel_carries_every_yaml(unpacked_wheel: Path) -> None:
    here = {file.relative_to(ROOT / "conf") for file in (ROOT / "conf").rglob("*.yaml")}
    there = {
        file.relative_to(unpacked_wheel / "lora_exp/conf")
        for file in (unpacked_wheel / "lora_exp/conf").rglob("*.yaml")
    }
    assert here == there
    assert (unpacked_wheel / "hydra_plugins/lora_exp_study/sweeper.py").is_file()
    assert not list(unpacked_wheel.rglob("tests"))
    assert "lora-exp = lora_exp.__main__:main" in next(unpacked_wheel.glob("*.dist-info/entry_points.txt")).read_text()


def test_it_composes_from_an_empty_folder(unpacked_wheel: Path, tmp_path: Path) -> None:
    program = "import lora_exp.__main__ as m, sys; print(m.__file__); sys.argv = ['lora-exp', '--cfg', 'job']; m.main()"
    environment = {**os.environ, "PYTHONPATH": str(unpacked_wheel)}
    run = [sys.executable, "-c", program]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(unpacked_wheel))
    assert "smollm2_135m" in done.stdout
