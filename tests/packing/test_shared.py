"""Jobs that share a process leave what each leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_exp.job import read_metrics
from lora_exp.packing import shelf

CLOCK = ("_per_s", "train/mfu")


@pytest.fixture(autouse=True)
def _empty_shelf():
    shelf._shelf.drop()
    yield
    shelf._shelf.drop()


def earned(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    records = [
        {name: value for name, value in record.items() if not name.endswith(CLOCK)} for record in read_metrics(folder)
    ]
    return {file.name: file.read_bytes() for file in sorted((folder / "adapter").glob("*.safetensors"))}, records


def test_jobs_in_turn_leave_the_bits_they_leave_alone(cli, tiny_overrides, tmp_path):
    swept = ["rank=2,4", "adapter=lora,dora", "dropout=0.3", "seed=1,2"]
    basic = cli("-m", *tiny_overrides, *swept, "hydra.sweep.dir=basic")
    packed = cli("-m", *tiny_overrides, *swept, "hydra.sweep.dir=packed", "hydra/launcher=packed")
    assert (basic.code, packed.code) == (0, 0), packed.err
    for number in range(8):
        alone, ours = earned(tmp_path / "basic" / str(number)), earned(tmp_path / "packed" / str(number))
        assert ours == alone
        assert ours[1]
