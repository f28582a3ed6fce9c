"""A base is handed to the next job as it was read, whatever was done over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lora_exp import models
from lora_exp.adapters.inspection.base_hash import base_sha256
from lora_exp.job import read_metrics
from lora_exp.models.twin import twin

SLOW = pytest.mark.slow
IN_TURN = ["hydra/launcher=packed", "hydra.launcher.lanes=1"]
WAYS = {
    "nf4": ["quantization=nf4", "adapter=lora,dora"],
    "int8": ["quantization=int8", "rank=2,4"],
    "peft": ["backend=peft", "rank=2,4"],
    "hf": ["trainer=hf", "rank=2,4"],
    "full": ["adapter=full,lora"],
    "checkpointing": ["train.gradient_checkpointing=true", "dropout=0.3", "rank=2,4"],
    "bfloat16": ["model.dtype=bfloat16", "rank=2,4"],
    "biases": ["bias=all", "rank=2,4"],
}


def test_a_twin_has_the_same_weights_and_nothing_else(tiny_llama: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_llama).eval()
    own, before = twin(base), base_sha256(base)
    theirs = dict(base.named_parameters(remove_duplicate=False))
    assert all(parameter is theirs[name] for name, parameter in own.named_parameters(remove_duplicate=False))
    assert not {id(module) for module in own.modules()} & {id(module) for module in base.modules()}
    assert not {buffer.data_ptr() for buffer in own.buffers()} & {buffer.data_ptr() for buffer in base.buffers()}
    own.train()
    own.config.use_cache = False
    own.lm_head.register_forward_hook(lambda *_: torch.zeros(1))
    own.model.layers[0].mlp = torch.nn.Identity()
    assert not any(module.training for module in base.modules())
    assert (base.config.use_cache, len(base.lm_head._forward_hooks)) == (True, 0)
    assert base_sha256(base) == before


@pytest.mark.parametrize("way", [*(pytest.param(way, marks=() if way == "nf4" else SLOW) for way in WAYS)])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft
def test_the_second_job_leaves_what_it_leaves_alone(
    way: str, cli: Callable[..., Any], tiny_overrides: list[str], even_llama: Path, workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    given = [*tiny_overrides, f"model.path={even_llama}", "tracking=none"]
    loaded, real = [], models.load_base
    monkeypatch.setattr(models, "load_base", lambda *args, **named: (loaded.append(1), real(*args, **named))[1])
    ended = cli("-m", *given, *WAYS[way], *IN_TURN, "hydra.sweep.dir=packed")
    assert ended.code == 0, ended.err
    assert "read anew" not in ended.out
    assert len(loaded) == (2 if way == "full" else 1)
    last = [f"{key}={values.split(',')[-1]}" for key, _, values in (each.partition("=") for each in WAYS[way])]
    assert cli(*given, *last, "hydra.run.dir=alone").code == 0
    assert curve(workplace / "packed/1") == curve(workplace / "alone")


def test_a_base_that_was_written_to_is_read_anew(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_exp.packing import resident

    real = resident.twin

    def damaging(base: torch.nn.Module) -> torch.nn.Module:
        own = real(base)
        next(own.parameters()).data.view(-1)[:4] += 1.0  # as no torch counter sees
        return own

    given = [*tiny_overrides, "tracking=none", "rank=2,4", "-m", *IN_TURN]
    monkeypatch.setattr(resident, "twin", damaging)
    ended = cli(*given, "hydra.sweep.dir=packed")
    assert ended.code == 0
    assert ended.out.count("Something has written to the frozen base that jobs share: it is read anew") == 1


def curve(folder: Path) -> list[dict[str, float]]:
    return [{k: v for k, v in each.items() if not k.endswith(("_per_s", "mfu"))} for each in read_metrics(folder)]
