"""Jobs of a lane each, alone and in company, over a base given."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lora_exp import LoraConfig, LoraModel
from lora_exp.adapters.joint import JointModel
from lora_exp.config import Config, OptimizerConfig, TrainConfig
from lora_exp.models.twin import twin
from lora_exp.packing.company import Company
from lora_exp.packing.lanes import passes_of, run_in_lanes
from lora_exp.packing.turns import Turn
from lora_exp.training.loop import Forward, Lane, Record, train
from lora_exp.training.objectives import causal_lm_losses, count_predictions
from lora_exp.training.optimizers import build_optimizer
from lora_exp.training.schedules import build_schedule
from lora_exp.training.timetable import Timetable

ROWS, LENGTH = 2, 12


@dataclass(frozen=True)
class Kind:
    """One lane's own choices."""

    adapter: LoraConfig
    steps: int = 6
    lr: float = 2e-2
    seed: int = 0
    accumulate: int = 1
    schedule: str = "cosine"
    fails_at: int | None = None
    diverges: bool = False


def batches_of(seed: int) -> Iterator[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(100 + seed)
    while True:
        tokens = torch.randint(3, 90, (ROWS, LENGTH), generator=generator)
        yield {"input_ids": tokens, "labels": tokens}


def trained(base: torch.nn.Module, kind: Kind, **changes: Any) -> list[Record]:
    """What a lane records, and at its end its parameters as a record."""
    torch.manual_seed(kind.seed)
    model = LoraModel(twin(base), kind.adapter, verbose=False)
    parameters = list(model.adapter_parameters().values())
    section = TrainConfig(
        steps=kind.steps, warmup_steps=1, eval_every=3, schedule=kind.schedule, grad_accum_steps=kind.accumulate
    )
    times = Timetable.of(section, None)
    optimizer = build_optimizer(parameters, OptimizerConfig("adamw", lr=kind.lr, weight_decay=0.01))
    schedule = build_schedule(optimizer, section, times)
    evaluation = list(itertools.islice(batches_of(99), 2))
    lane = Lane("default", parameters, batches_of(kind.seed), evaluation, optimizer, schedule, times, 0.5)

    def between_steps() -> None:
        if lane.state.step == kind.fails_at:
            raise ValueError("on purpose")
        if kind.diverges and lane.state.step == 2:
            parameters[0].data.fill_(float("nan"))

    forward = Forward(model, causal_lm_losses, count_predictions, torch.device("cpu"), between_steps=between_steps)
    records = list(train(replace(forward, **changes), [lane]))
    values = {"parameters": torch.cat([parameter.detach().flatten() for parameter in parameters])}
    return [*[{k: v for k, v in record.items() if not k.endswith("_per_s")} for record in records], values]


def in_company(
    base: torch.nn.Module,
    kinds: Sequence[Kind],
    most: int | None = None,
    is_batched: bool = False,
    config: Config | None = None,
) -> tuple[list[Turn], Company]:
    def job(kind: Kind) -> Callable[[], list[Record]]:
        return lambda: trained(base, kind, passes=passes_of(config or Config()))

    company = Company(lambda device: JointModel(twin(base), is_batched))
    turns = [Turn(str(number), job(kind)) for number, kind in enumerate(kinds)]
    run_in_lanes(turns, company, lambda asked: most or len(kinds))
    return turns, company


def same(ours: list[Record], theirs: list[Record]) -> bool:
    """To the bit."""
    return ours[:-1] == theirs[:-1] and torch.equal(ours[-1]["parameters"], theirs[-1]["parameters"])
