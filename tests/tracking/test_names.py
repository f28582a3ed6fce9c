"""Names of runs without training anything: what sets a sweep's job apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from lora_exp.composing import swept_keys
from lora_exp.config import Config, TrackingConfig, conf_folder
from lora_exp.job import Job
from lora_exp.schema import register
from lora_exp.tracking.setup import run_name, sweep_name

register()
OVERRIDES = ["model=hf", "+experiment=smoke", "rank=2", "scaling=rslora"]


@pytest.mark.parametrize(
    ("swept", "own", "expected"),
    [
        (("rank",), None, "rank=2"),
        (("rank", "scaling"), None, "rank=2 scaling=rslora"),
        (("rank",), "mine", "mine rank=2"),
        (("experiment", "model"), None, "model=hf experiment=smoke"),
        ((), "mine", "mine 3"),
    ],
)
def test_a_child_is_named_by_what_differs(swept: tuple[str, ...], own: str | None, expected: str) -> None:
    config = Config(tracking=TrackingConfig(run_name=own))
    job = Job(Path(), 3, OVERRIDES, sweep_folder=Path(), swept=swept)
    assert run_name(config, job) == expected
    assert sweep_name(config, job) == (own or (f"sweep over {', '.join(swept)}" if swept else None))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["rank=8,16", "seed=0"], ["rank"]),
        (["+experiment=rank_sweep"], ["rank"]),
        (["+experiment=rank_sweep", "rank=4"], []),
        (["+experiment=rank_sweep", "seed=range(3)"], ["rank", "seed"]),
        (["+experiment=smoke,scaling"], ["experiment"]),
        (["optimizer.lr=interval(1e-4,1e-2)", "adapter=choice(lora,dora)"], ["optimizer.lr", "adapter"]),
        (["targets=[q_proj,v_proj],[q_proj]"], ["targets"]),
        (["targets=[q_proj,v_proj]"], []),
    ],
)
def test_swept_keys_are_those_with_several_values(overrides: list[str], expected: list[str]) -> None:
    with initialize_config_dir(str(conf_folder()), version_base="1.3"):
        files = [o for o in overrides if o.startswith("+experiment=") and "," not in o]
        composed = compose("config", files, return_hydra_config=True)
    composed.hydra.overrides.task = overrides
    assert swept_keys(composed) == expected
