"""Eight rows in one micro batch, or one at a time: the same optimizer step, whatever their answers' lengths."""

from __future__ import annotations

import contextlib
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.config import TrainConfig
from lora_exp.machine.place import Place
from lora_exp.training.batches import training_batches
from lora_exp.training.lane import Lane
from lora_exp.training.loop import DivergedError, Forward, train
from lora_exp.training.metrics import RowLosses
from lora_exp.training.optimizers import gradient_scaler
from lora_exp.training.schedules import build_schedule
from lora_exp.training.timetable import Timetable, micro_batches_of

ROWS, LENGTH, WORDS = 24, 9, 13


def rows(count: int = ROWS) -> list[dict[str, Tensor]]:
    """Answers of 1 to 8 tokens; what is before them is not learnt."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for index in range(count):
        ids = torch.randint(0, WORDS, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: LENGTH - 1 - index % 8] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


class Tiny(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.head = nn.Embedding(WORDS, 6, dtype=dtype), nn.Linear(6, WORDS, dtype=dtype)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids).cumsum(1)))


def tokenwise(model: nn.Module, batch: Any) -> RowLosses:
    """The causal objective in the model's own dtype: the harness's is in float32."""
    logits, labels = model(batch["input_ids"])[:, :-1], batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="none")
    return RowLosses(losses.view(labels.shape).sum(1), (labels != -100).sum(1))


def stacked(these: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in these]) for name in these[0]}


def trained(
    micro: int, accumulate: int, dtype: torch.dtype, count: int = ROWS, objective: Any = tokenwise, **changes: Any
) -> tuple[list[float], list[Tensor], Lane]:
    """Losses and final parameters of an epoch or more; the order of rows is the same whatever the micro batch."""
    section = TrainConfig(
        **{"epochs": 2, "micro_batch_size": micro, "grad_accum_steps": accumulate, "eval_every": 0, **changes}
    )
    model = Tiny(dtype)
    known = micro_batches_of(count, micro, section.drop_last)
    times = Timetable.of(section, known)
    data = rows(count)
    batches = training_batches(data, micro, 5, False, stacked, section.drop_last)  # type: ignore[arg-type]
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    lane = Lane("a", parameters, batches, [stacked(data[:2])], optimizer, build_schedule(optimizer, section, times),
                times, 1.0)  # fmt: skip
    forward = Forward(model, objective, lambda batch: (batch["labels"][:, 1:] != -100).sum(1), torch.device("cpu"))
    losses = [record["train/loss"] for record in train(forward, [lane]) if "train/loss" in record]
    return losses, [parameter.detach().double() for parameter in parameters], lane


@pytest.mark.parametrize(("dtype", "exact"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("micro", "accumulate"), [(1, 8), (2, 4), (4, 2)])
def test_eight_at_once_or_one_by_one(dtype: torch.dtype, exact: float, micro: int, accumulate: int) -> None:
    losses, values, _ = trained(8, 1, dtype)
    others, other_values, _ = trained(micro, accumulate, dtype)
    assert len(losses) == 6
    assert others == pytest.approx(losses, abs=exact)
    for mine, other in zip(values, other_values, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=exact)


def test_a_mean_of_means_would_be_seen() -> None:
    """What this guards against is larger than its tolerance: the usual mistake, made on purpose."""

    def averaged(model: nn.Module, batch: Any) -> RowLosses:
        found = tokenwise(model, batch)
        return RowLosses(found.total * 8 * 4.5 / (8 * found.count), found.count)

    assert trained(1, 8, torch.float64, objective=averaged)[0] != pytest.approx(
        trained(8, 1, torch.float64)[0], abs=1e-3
    )


@pytest.mark.parametrize("count", [20, 21, 23])
def test_the_last_step_of_an_epoch_takes_what_is_left(count: int) -> None:
    """20 rows are 8 + 8 + 4: no row of the next epoch comes into the third step, and none is left out."""
    losses, values, lane = trained(8, 1, torch.float64, count)
    others, other_values, other = trained(1, 8, torch.float64, count)
    assert len(losses) == len(others) == 6
    assert others == pytest.approx(losses, abs=1e-12)
    assert all(torch.allclose(mine, also, rtol=0, atol=1e-12) for mine, also in zip(values, other_values, strict=True))
    assert lane.state.units == other.state.units == 2 * count * LENGTH


def test_drop_last_leaves_out_a_micro_batch_that_is_not_full() -> None:
    _, _, lane = trained(8, 1, torch.float64, 23, drop_last=True)
    assert (lane.state.step, lane.state.units) == (4, 2 * 16 * LENGTH)
    _, _, lane = trained(2, 4, torch.float64, 23, drop_last=True)
    assert (lane.state.step, lane.state.units) == (6, 2 * 22 * LENGTH)


def test_lanes_of_other_lengths_train_side_by_side_as_alone() -> None:
    """Each by its own timetable: steps, accumulation, schedule."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.models = nn.ModuleDict({"a": Tiny(torch.float64), "b": Tiny(torch.float64)})
            self.rows: dict[str, int] = {}

        def forward(self, ids: Tensor) -> Tensor:
            parts = ids.split(list(self.rows.values()))
            return torch.cat([self.models[name](part) for name, part in zip(self.rows, parts, strict=True)])

    def run(names: str) -> dict[str, list[float]]:
        model = Two()

        @contextlib.contextmanager
        def route(rows: Any) -> Any:
            model.rows = dict(rows)
            yield

        lanes = []
        for name in names:
            plan = {"a": Timetable(9, 1), "b": Timetable(4, 3, 1, epoch_micro_batches=8)}[name]
            parameters = list(model.models[name].parameters())
            optimizer = torch.optim.SGD(parameters, lr=0.3)
            batches = itertools.cycle([stacked(rows()[start : start + 2]) for start in range(0, 8 + ord(name) % 2, 2)])
            lanes.append(Lane(name, parameters, batches, [], optimizer, build_schedule(optimizer, TrainConfig(), plan),
                              Timetable(plan.steps, plan.grad_accum_steps, 0, plan.epoch_micro_batches, None, 1)))  # type: ignore[arg-type]  # fmt: skip
        forward = Forward(
            model, tokenwise, lambda batch: (batch["labels"][:, 1:] != -100).sum(1), torch.device("cpu"), route=route,
            metrics={"loss": lambda sums: 0.0},
        )  # fmt: skip
        found: dict[str, list[float]] = {name: [] for name in names}
        for record in train(forward, lanes):
            if "train/loss" in record:
                found[record["lane"]].append(record["train/loss"])
        return found

    together = run("ab")
    assert {name: len(losses) for name, losses in together.items()} == {"a": 9, "b": 4}
    for name in "ab":
        assert together[name] == pytest.approx(run(name)[name], abs=1e-12)


class Overflowing(torch.amp.GradScaler):
    """A scaler whose first scales are too much for a float32: the gradients of those steps are infinite."""

    def __init__(self, scale: float) -> None:
        super().__init__("cpu", init_scale=scale, growth_interval=10_000)


def steep(model: nn.Module, batch: Any) -> RowLosses:
    found = tokenwise(model, batch)
    return RowLosses(found.total * 64, found.count)


def scaled(
    scaler: torch.amp.GradScaler | None, steps: int = 8, objective: Any = steep
) -> tuple[list[float], list[int], Lane]:
    """Losses, at which steps the parameters stayed as they were, and the lane."""
    model, plan = Tiny(torch.float32), TrainConfig(schedule="linear")
    parameters, times = list(model.parameters()), Timetable(steps, log_every=Fraction(1))
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    batches = itertools.cycle([stacked(rows()[start : start + 8]) for start in (0, 8, 16)])
    lane = Lane(
        "a",
        parameters,
        batches,
        [stacked(rows())],
        optimizer,
        build_schedule(optimizer, plan, times),
        times,
        1.0,
        scaler,
    )
    forward = Forward(model, objective, lambda batch: (batch["labels"][:, 1:] != -100).sum(1), torch.device("cpu"))
    losses, left, before = [], [], [value.detach().clone() for value in parameters]
    for record in train(forward, [lane]):
        if "train/loss" in record:
            losses.append(record["train/loss"])
            left += [record["step"]] if all(map(torch.equal, before, parameters)) else []
            before = [value.detach().clone() for value in parameters]
    return losses, left, lane


def test_a_scaler_changes_nothing_but_the_gradients_exponent() -> None:
    """Powers of two are exact: the same bits as without."""
    plain, _, _ = scaled(None)
    assert scaled(Overflowing(2.0**16))[0] == plain


def test_steps_whose_scaled_gradients_overflow_are_left_out_and_their_schedule_waits() -> None:
    losses, left, lane = scaled(Overflowing(2.0**127))
    plain, _, _ = scaled(None)
    assert left == list(range(1, len(left) + 1))
    assert 1 <= len(left) <= 5
    assert lane.schedule.last_epoch == 8 - len(left)
    assert lane.state.step == 8
    assert losses[len(left)] == pytest.approx(plain[0], rel=0.1)  # the first batches differ, nothing is learnt yet


def test_gradients_that_overflow_at_every_scale_are_a_divergence() -> None:
    def poisoned(model: nn.Module, batch: Any) -> RowLosses:
        found, weight = tokenwise(model, batch), next(model.parameters())
        return RowLosses(found.total + (weight - weight).sum().sqrt(), found.count)  # 0, and its gradient is a NaN

    with pytest.raises(DivergedError, match=r"train/grad_norm became nan at optimizer step 30 "):
        scaled(Overflowing(2.0**16), 40, poisoned)


def test_float16_products_are_scaled_and_others_are_not() -> None:
    cpu = torch.device("cpu")
    assert gradient_scaler(Place(cpu, torch.float32)) is None
    assert gradient_scaler(Place(cpu, torch.bfloat16)) is None
    assert gradient_scaler(Place(cpu, torch.float32, torch.bfloat16)) is None
    assert gradient_scaler(Place(cpu, torch.float16)) is not None
    assert gradient_scaler(Place(cpu, torch.float32, torch.float16)) is not None
