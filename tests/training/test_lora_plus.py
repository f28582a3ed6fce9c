"""LoRA+ against PEFT's create_loraplus_optimizer: the same groups, the same losses."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn

from lora_exp import LoraConfig, LoraModel
from lora_exp.config import OptimizerConfig, TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.optimizers import build_optimizer
from lora_exp.training.schedules import build_schedule
from lora_exp.training.timetable import Timetable

LR, RATIO, DECAY = 1e-2, 16.0, 0.1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.q_proj = nn.Linear(16, 16)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.head(self.norm(torch.tanh(self.q_proj(self.embed(tokens)))))


CASES: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "biases": {"bias": "all"},
    "saved head": {"modules_to_save": ["head"]},
    "embedding": {"target_modules": ["q_proj", "embed"]},
}


def both(options: dict[str, Any]) -> tuple[LoraModel, Any]:
    """Our model and PEFT's, alike to the last value."""
    torch.manual_seed(0)
    options = {"target_modules": ["q_proj"], "lora_alpha": 8, "use_rslora": True, **options}
    base = Net()
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, **options))
    ours = LoraModel(base, LoraConfig(rank=4, **options), verbose=False)
    values = dict(theirs.base_model.model.named_parameters())
    with torch.no_grad():
        for name, mine in ours.adapter_parameters().items():
            value = _theirs(values, name)
            mine.copy_(value.T if ".lora_" in name else value)
    return ours, theirs


def _theirs(values: dict[str, Any], name: str) -> Any:
    layer, _, what = name.rpartition(".")
    keys = (
        f"{what}.default.weight",
        f"{what.replace('lora', 'lora_embedding')}.default",
        "lora_magnitude_vector.default.weight",
    )
    own = (f"{layer}.base_layer.{what}", f"{layer}.modules_to_save.default.{what}", name)
    wanted = [f"{layer}.{key}" for key in keys] if what in ("lora_A", "lora_B", "magnitude") else own
    return next(values[key] for key in wanted if key in values)


def optimizers(ours: LoraModel, theirs: Any) -> tuple[torch.optim.Optimizer, Any]:
    section = OptimizerConfig("adamw", lr=LR, lora_plus_ratio=RATIO, weight_decay=DECAY)
    mine = build_optimizer(ours.adapter_parameters().values(), section, ours.fast_parameters())
    # PEFT's embeddings have a rate of their own, 1e-6 by default, which trains nothing; here they have A's.
    rates = {"lr": LR, "loraplus_lr_ratio": RATIO, "loraplus_weight_decay": DECAY, "loraplus_lr_embedding": LR}
    return mine, create_loraplus_optimizer(theirs, torch.optim.AdamW, **rates)


@pytest.mark.parametrize("case", CASES)
def test_groups_and_losses_are_pefts(case: str) -> None:
    ours, theirs = both(CASES[case])
    made = optimizers(ours, theirs)

    def groups(optimizer: torch.optim.Optimizer) -> list[Any]:
        rows = [(g["lr"], g["weight_decay"], sorted(p.numel() for p in g["params"])) for g in optimizer.param_groups]
        merged: dict[Any, list[int]] = {}
        for rate, decay, sizes in rows:
            merged[rate, decay] = sorted(merged.get((rate, decay), []) + sizes)
        return sorted((key, sizes) for key, sizes in merged.items() if sizes)

    assert groups(made[0]) == groups(made[1])
    tokens = torch.randint(0, 11, (8, 5))
    schedules = [build_schedule(optimizer, TrainConfig(), Timetable(8, warmup_steps=2)) for optimizer in made]
    for _ in range(8):
        losses = []
        for model, optimizer, schedule in zip((ours, theirs), made, schedules, strict=True):
            loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_without_a_ratio_there_is_one_group() -> None:
    ours, _ = both({})
    optimizer = build_optimizer(ours.adapter_parameters().values(), OptimizerConfig("adamw"), ours.fast_parameters())
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_eight_bit_optimizers_have_the_groups_too(name: str) -> None:
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    target = torch.randn(64, 128)
    slow, fast = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(64, 128))
    section = OptimizerConfig(name, lr=1e-3, lora_plus_ratio=10)
    optimizer = build_optimizer([slow, fast], section, {"lora_B": fast})
    for _ in range(3):
        ((slow - target).square().sum() + (fast - target).square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (fast.abs().sum() / slow.abs().sum()).item() == pytest.approx(10, rel=0.05)
    assert optimizer.state[fast]["state1"].dtype == torch.uint8


@pytest.mark.parametrize("options", [{"variant": "vera"}, {"target_modules": ["embed"]}])
def test_an_adapter_without_B_is_refused(options: dict[str, Any]) -> None:
    model = LoraModel(Net(), LoraConfig(rank=4, **{"target_modules": ["q_proj"], **options}), verbose=False)
    section = OptimizerConfig("adamw", lora_plus_ratio=RATIO)
    with pytest.raises(UserError, match=r"lora_plus_ratio=16\.0 is for a factor B"):
        build_optimizer(model.adapter_parameters().values(), section, model.fast_parameters())


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["adapter=full"], "lora_plus_ratio=16.0 is for a factor B, which adapter=full has not"),
        (["adapter=vera"], "lora_plus_ratio=16.0 is for a factor B"),
        (["optimizer.lora_plus_ratio=0"], "lora_plus_ratio=0.0 must be a finite number above 0"),
    ],
)
def test_what_it_is_not_for_is_refused_by_name(overrides: list[str], said: str, cli: Any, tiny_overrides: Any) -> None:
    done = cli(*tiny_overrides, "tracking=none", "optimizer.lora_plus_ratio=16", *overrides)
    assert done.code
    assert said in done.err


@pytest.mark.parametrize("backend", ["native", "peft"])
def test_it_is_trained_from_the_command_line(backend: str, cli: Any, tiny_overrides: Any) -> None:
    done = cli(*tiny_overrides, "tracking=none", f"backend={backend}", "optimizer.lora_plus_ratio=16", "bias=all")
    assert done.code == 0, done.err
