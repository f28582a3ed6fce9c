"""The one training loop: lanes over a frozen base, a plain dict of metrics a lane and logged step.

It knows nothing of LoRA, Hydra or MLflow. A lane is what is trained together: parameters, data order, optimizer
and schedule. Several lanes share a forward pass: their micro batches are concatenated, ``route`` sends
each slice of rows its own way, and the loss is the sum of the lanes' means.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from lora_exp.config import TrainConfig
from lora_exp.errors import UserError
from lora_exp.training.metrics import Metric, RowLosses, Sums, chosen
from lora_exp.training.objectives import Batch

Context = contextlib.AbstractContextManager[object]
Record = dict[str, Any]


@dataclass
class Lane:
    """One set of parameters in training. Records carry its ``name``."""

    name: str
    parameters: list[nn.Parameter]
    batches: Iterator[Batch]
    evaluation: list[Batch]
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler


@dataclass(frozen=True)
class Forward:
    """How a batch becomes losses: the model, the objective, and the contexts around a pass.

    ``count`` tells a batch's predictions a row, (B,), before the pass. ``route`` gets rows by lane name;
    ``check_gradients`` is called after the first backward pass, ``between_batches`` before every micro batch and every
    evaluation batch: it may raise to end the training. ``metrics`` are an evaluation's, by name. ``join`` makes one batch
    of the lanes'.
    """

    model: nn.Module
    losses: Callable[[nn.Module, Batch], RowLosses]
    count: Callable[[Batch], Tensor]
    device: torch.device
    compute: Callable[[], Context] = contextlib.nullcontext
    route: Callable[[Mapping[str, int]], Context] = field(default=lambda rows: contextlib.nullcontext())
    check_gradients: Callable[[], object] = lambda: None
    metrics: Mapping[str, Metric] = field(default_factory=chosen)
    unit: str = "tokens"
    between_batches: Callable[[], object] = lambda: None
    join: Callable[[Sequence[Batch]], Batch] = field(default=lambda batches: _concatenate(batches))


class DivergedError(UserError):
    """A loss that is no longer finite."""


def train(forward: Forward, lanes: list[Lane], section: TrainConfig) -> Iterator[Record]:
    """Train every lane for ``section.steps`` optimizer steps and yield its metrics as they become known.

    Yields ``eval/*`` records at step 0, each ``eval_every`` steps and at the end, ``train/*`` records each
    ``log_every`` steps. Between these nothing is copied from the device. Raises ``DivergedError`` that names the first
    step whose loss or gradient norm is not finite: on the CPU before that step changes a parameter, elsewhere before
    the next record.
    """
    yield from (_evaluated(forward, lane, 0) for lane in lanes)
    forward.model.train()
    clock, watches = _Clock(), [_Watch(lane) for lane in lanes]
    for step in range(1, section.steps + 1):
        losses, tokens = _accumulate(forward, lanes, section.grad_accum_steps)
        if step == 1:
            forward.check_gradients()
        clock.count(tokens)
        rates = [float(lane.schedule.get_last_lr()[0]) for lane in lanes]
        norms = [nn.utils.clip_grad_norm_(lane.parameters, section.max_grad_norm) for lane in lanes]
        for watch, loss, norm in zip(watches, losses, norms, strict=True):
            watch.note(step, loss, norm)
        is_logged = step % section.log_every == 0 or step == section.steps
        is_evaluated = step % section.eval_every == 0 or step == section.steps
        if is_logged or is_evaluated or _answers_at_once(forward.device):
            for watch in watches:
                watch.check()
        for lane in lanes:
            _update(lane)
        if is_logged:
            logged = zip(lanes, losses, norms, rates, strict=True)
            records = [_trained(lane, step, loss, norm, rate) for lane, loss, norm, rate in logged]
            speed = clock.lap() / len(lanes)
            yield from ({**record, f"train/{forward.unit}_per_s": speed} for record in records)
        if is_evaluated:
            clock.pause()
            yield from (_evaluated(forward, lane, step) for lane in lanes)
            forward.model.train()
            clock.resume()


@torch.no_grad()
def evaluate(forward: Forward, lane: Lane) -> dict[str, float]:
    """The metrics over the lane's evaluation batches; ``loss`` is the mean in nats a prediction."""
    forward.model.eval()
    sums = Sums()
    for batch in lane.evaluation:
        forward.between_batches()
        here = _to_device(batch, forward.device)
        with forward.compute(), forward.route({lane.name: _rows(batch)}):
            sums = sums.plus(forward.losses(forward.model, here))
    return {name: metric(sums) for name, metric in forward.metrics.items()}


def _accumulate(forward: Forward, lanes: list[Lane], micro_steps: int) -> tuple[list[Tensor], int]:
    """Gradients of one optimizer step. Each lane's loss is the mean over all its tokens of the step."""
    drawn = [[next(lane.batches) for lane in lanes] for _ in range(micro_steps)]
    counts = [sum(int(forward.count(micro[i]).sum()) for micro in drawn) for i in range(len(lanes))]
    losses = [torch.zeros((), device=forward.device) for _ in lanes]
    for micro in drawn:
        forward.between_batches()
        rows = {lane.name: _rows(batch) for lane, batch in zip(lanes, micro, strict=True)}
        batch = _to_device(micro[0] if len(micro) == 1 else forward.join(micro), forward.device)
        with forward.compute(), forward.route(rows):
            totals = forward.losses(forward.model, batch).total.split(list(rows.values()))
        means = [total.sum() / count for total, count in zip(totals, counts, strict=True)]
        loss = torch.stack(means).sum()
        if not loss.requires_grad:
            raise UserError(
                "The loss depends on no trained parameter: the model reads the targeted weights without calling their "
                "layers, or gradients are cut off on the way. Choose targets that the model calls"
            )
        loss.backward()
        losses = [so_far + mean.detach() for so_far, mean in zip(losses, means, strict=True)]
    return losses, sum(_tokens(batch) for micro in drawn for batch in micro)


def _update(lane: Lane) -> None:
    lane.optimizer.step()
    lane.schedule.step()
    lane.optimizer.zero_grad(set_to_none=True)


def _trained(lane: Lane, step: int, loss: Tensor, norm: Tensor, rate: float) -> Record:
    values = {"train/loss": loss.item(), "train/grad_norm": norm.item(), "train/lr": rate}
    return {"lane": lane.name, "step": step, **values}


def all_finite(parameters: list[nn.Parameter]) -> bool:
    """Whether no value is a NaN or infinite. One copy from the device."""
    return bool(torch.stack([parameter.detach().isfinite().all() for parameter in parameters]).all().item())


def _answers_at_once(device: torch.device) -> bool:
    """Whether to read a value costs nothing: elsewhere the host would wait for the device at each step."""
    return device.type == "cpu"


class _Watch:
    """A lane's losses and gradient norms since the last ``check``, left on the device until then."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._steps: list[int] = []
        self._values: list[Tensor] = []

    def note(self, step: int, loss: Tensor, norm: Tensor) -> None:
        self._steps.append(step)
        self._values += [loss.detach(), norm.detach()]

    def check(self) -> None:
        values = torch.stack([value.float() for value in self._values]).tolist()
        for step, loss, norm in zip(self._steps, values[::2], values[1::2], strict=True):
            bad = {name: value for name, value in (("loss", loss), ("grad_norm", norm)) if not math.isfinite(value)}
            for name, value in bad.items():
                raise DivergedError(
                    f"train/{name} became {value} at optimizer step {step} (lane {self._lane.name}): "
                    f"lower optimizer.lr (it is {self._lane.optimizer.defaults['lr']:g}) or train.max_grad_norm, "
                    "or use model.dtype=float32"
                )
        self._steps, self._values = [], []


def _evaluated(forward: Forward, lane: Lane, step: int) -> Record:
    figures = evaluate(forward, lane)
    loss = figures["loss"]
    if not math.isfinite(loss) and not step:
        raise DivergedError(
            f"eval/loss is {loss} (lane {lane.name}) before anything is trained: the base's weights are damaged "
            "(copy them anew), or overflow in this dtype (try model.dtype=float32)"
        )
    if not math.isfinite(loss):
        raise DivergedError(f"eval/loss became {loss} at optimizer step {step} (lane {lane.name}): lower optimizer.lr")
    return {"lane": lane.name, "step": step} | {f"eval/{name}": value for name, value in figures.items()}


class _Clock:
    """Tokens a second of training alone: evaluation stops it."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
        self._paused_at = 0.0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._since += time.perf_counter() - self._paused_at

    def lap(self) -> float:
        now = time.perf_counter()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return rate


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _tokens(batch: Batch) -> int:
    return batch["labels"].numel()


def _concatenate(batches: Sequence[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
