"""A training that is taken up in another process, with other random numbers behind it, goes on in the same bits."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from lora_exp import LoraConfig, LoraModel
from lora_exp.backends import Adapted
from lora_exp.config import OptimizerConfig, TrainConfig
from lora_exp.errors import UserError
from lora_exp.machine.distributed import ALONE
from lora_exp.training.batches import training_batches
from lora_exp.training.checkpoints import Checkpoints
from lora_exp.training.lane import Lane
from lora_exp.training.loop import Forward, Record, train
from lora_exp.training.metrics import RowLosses
from lora_exp.training.optimizers import build_optimizer
from lora_exp.training.saving import Saver
from lora_exp.training.schedules import build_schedule
from lora_exp.training.state import TrainingState
from lora_exp.training.timetable import Timetable
from lora_exp.training.watch import DivergedError

STEPS, LEFT_AT, ROWS, SIZE = 9, 5, 8, 2
DATA = [{"labels": torch.tensor([i % 3]), "inputs": torch.randn(16, generator=torch.Generator().manual_seed(i))}
        for i in range(ROWS)]  # fmt: skip


class Net(nn.Module):
    """Draws from each generator that a model may draw from."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(16, 256), nn.BatchNorm1d(256), nn.Linear(256, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = nn.functional.dropout(self.norm(self.first(inputs)), 0.2, self.training)
        if self.training:
            hidden = hidden * (1 + 0.1 * random.random() + 0.1 * float(numpy.random.rand()))
        return self.head(hidden)


def losses(model: nn.Module, batch: Any) -> RowLosses:
    labels = batch["labels"][:, 0]
    return RowLosses(nn.functional.cross_entropy(model(batch["inputs"]), labels, reduction="none"), count(batch))


def count(batch: Any) -> Tensor:
    return torch.ones(len(batch["labels"]), dtype=torch.long)


def plain() -> Adapted:
    net = Net()
    return Adapted(net, list(net.parameters()), 0, 0, lambda folder: None)


def lora(**how: Any) -> Callable[[], Adapted]:
    def build() -> Adapted:
        torch.manual_seed(1)
        base = Net()
        torch.seed()  # the adapter begins otherwise each time
        model = LoraModel(base, LoraConfig(rank=2, target_modules=["first", "head"], **how), verbose=False)
        own = {id(value) for value in (*base.parameters(), *base.buffers())} - set(
            map(id, model.adapter_tensors().values())
        )
        named = (*model.named_parameters(), *model.named_buffers())
        added = {name: value for name, value in named if id(value) not in own}
        parameters = list(model.adapter_parameters().values())
        masks, load = model.dropout_state, model.load_dropout_state
        return Adapted(model, parameters, 0, 0, lambda folder: None, added=added, masks=masks, load_masks=load)

    return build


KINDS: dict[str, tuple[Callable[[], Adapted], str]] = {
    "all weights": (plain, "adamw"),
    "8 bit": (plain, "adamw_8bit"),
    "LoRA with dropout": (lora(lora_dropout=0.3), "adamw"),
    "DoRA, modules to save": (lora(variant="dora", modules_to_save=["norm"]), "adamw"),
    "LoRA-FA": (lora(variant="lora_fa"), "adamw"),
    "PiSSA": (lora(start="pissa"), "adamw"),
}


@dataclass
class Training:
    """One, made as a new process would make it."""

    adapted: Adapted
    lane: Lane
    state: TrainingState

    @classmethod
    def of(cls, kind: str) -> Training:
        build, optimizer = KINDS[kind]
        adapted, plan = build(), TrainConfig(warmup_steps=2, grad_accum_steps=2)
        times = Timetable(STEPS, 2, 2, epoch_micro_batches=4, eval_every=3, log_every=1)  # type: ignore[arg-type]
        chosen = build_optimizer(adapted.parameters, OptimizerConfig(optimizer, lr=1e-2, weight_decay=0.1))
        batches = training_batches(DATA, SIZE, 3, False, torch.utils.data.default_collate)  # type: ignore[arg-type]
        evaluation = [torch.utils.data.default_collate(DATA)]
        schedule = build_schedule(chosen, plan, times)
        lane = Lane("a", adapted.parameters, batches, evaluation, chosen, schedule, times)
        return cls(adapted, lane, TrainingState(adapted, lane))

    def run(self, leave_at: int | None = None) -> list[Record]:
        def between() -> None:
            if self.lane.state.step == leave_at:
                raise KeyboardInterrupt

        forward = Forward(self.adapted.model, losses, count, torch.device("cpu"), between_steps=between)
        seen: list[Record] = []
        with contextlib.suppress(KeyboardInterrupt):  # of leave_at
            for record in train(forward, [self.lane]):
                seen.append({name: value for name, value in record.items() if not name.endswith("_per_s")})
        return seen

    def values(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.adapted.model.state_dict().items()}


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("left_at", [2, LEFT_AT])
def test_the_rest_is_the_same_to_the_bit(kind: str, left_at: int, tmp_path: Path) -> None:
    """Left at the end of an epoch and inside one."""
    seeded(5)
    first = Training.of(kind)
    begun = first.run(leave_at=left_at)
    Checkpoints(tmp_path).save(left_at, first.state.take())
    rest = first.run()
    seeded(77)
    numpy.random.rand(3)
    other = Training.of(kind)
    found = Checkpoints(tmp_path).newest()
    assert found is not None
    other.state.restore(found.state())
    assert begun
    assert other.run() == rest
    assert rest[-1]["step"] == STEPS
    mine, theirs = other.values(), first.values()
    assert mine.keys() == theirs.keys()
    assert [name for name in mine if not torch.equal(mine[name], theirs[name])] == []


def test_another_model_is_refused_before_anything_is_changed() -> None:
    state = Training.of("all weights").state.take()
    other = Training.of("LoRA with dropout")
    before = other.values()
    with pytest.raises(UserError, match="The checkpoint is of another model"):
        other.state.restore(state)
    assert all(torch.equal(value, before[name]) for name, value in other.values().items())


def test_a_poisoned_state_is_never_written(tmp_path: Path) -> None:
    training = Training.of("all weights")
    work: Any = SimpleNamespace(checkpoints=Checkpoints(tmp_path), adapted=training.adapted, world=ALONE, start=None)
    saver = Saver(work, training.lane)
    training.run(leave_at=1)
    saver.save()
    training.run(leave_at=2)
    training.lane.parameters[0].data[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"no longer finite after optimizer step 2: lower optimizer\.lr"):
        saver.save()
    assert Checkpoints(tmp_path).steps() == [1]


def test_only_buffers_that_change_are_kept() -> None:
    training = Training.of("all weights")
    assert training.state.take()["buffers"] == {}
    training.run(leave_at=1)
    changed = {f"norm.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(training.state.take()["buffers"]) == changed
