"""The one training loop: lanes over a frozen base, a plain dict of metrics a lane and logged step.

It knows nothing of LoRA, Hydra or MLflow. A lane is what is trained together: parameters, data order, optimizer,
schedule and timetable. Several lanes share a forward pass: their micro batches are concatenated, ``route`` sends
each slice of rows its own way, and the loss is the sum of the lanes' means.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_exp.errors import UserError
from lora_exp.machine.distributed import ALONE, World
from lora_exp.training.clock import Clock
from lora_exp.training.lane import Lane, LaneState
from lora_exp.training.metrics import Metric, RowLosses, Sums, chosen, merged
from lora_exp.training.objectives import Batch
from lora_exp.training.watch import DivergedError, Seen, Watch

__all__ = ["Context", "DivergedError", "Forward", "Lane", "LaneState", "Record", "evaluate", "train"]

Context = contextlib.AbstractContextManager[object]
Record = dict[str, Any]
Figures = dict[str, float]


class Passed(NamedTuple):
    """What the passes of one optimizer step found: each lane's loss, and how many tokens (images, rows) it saw."""

    losses: list[Tensor]
    units: list[int]


Passes = Callable[["Forward", Sequence[Lane], Sequence[Sequence[Batch]]], Passed]


@dataclass(frozen=True)
class Forward:
    """How a batch becomes losses: the model, the objective, and the contexts around a pass.

    ``count`` tells a batch's predictions a row, (B,), before the pass. ``route`` gets rows by lane name;
    ``check_gradients`` is called after the first backward pass, ``between_steps`` before every optimizer step and after
    the last, ``between_batches`` before every evaluation batch: both may raise to end the training, where its state is
    whole. ``metrics`` are an evaluation's, by name. ``join`` makes one batch of the lanes'.
    ``world``: the processes that train together, each on batches of its own. ``at_start`` is given what evaluates
    before the first step, and returns what that gives, which somebody may know already. ``passes`` makes the gradients
    of one optimizer step.
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
    between_steps: Callable[[], object] = lambda: None
    world: World = ALONE
    join: Callable[[Sequence[Batch]], Batch] = field(default=lambda batches: _concatenate(batches))
    at_start: Callable[[Callable[[], Figures]], Figures] = field(default=lambda make: make())
    passes: Passes = field(default=lambda forward, lanes, drawn: passes(forward, lanes, drawn))


def train(forward: Forward, lanes: list[Lane]) -> Iterator[Record]:
    """Train every lane to its end, and yield its metrics as they become known.

    Yields ``eval/*`` records before the first step, as each lane's timetable says and after its last step, ``train/*``
    records as the timetable says. Between these nothing is copied from the device. A lane ends early where its
    ``state.best`` says so. Raises ``DivergedError`` that names the first step whose loss or gradient norm is not
    finite: on the CPU before that step changes a parameter, elsewhere before the next record or checkpoint.
    """
    yield from evaluations(forward, lanes)
    forward.model.train()
    clock, watches = Clock(), {lane.name: Watch(lane) for lane in lanes}
    is_first = True
    while active := [lane for lane in lanes if not lane.is_over]:
        forward.between_steps()
        losses, units = _accumulate(forward, active)
        if is_first:
            forward.check_gradients()
            is_first = False
        clock.count(sum(units))
        seen = [_clipped(lane, loss) for lane, loss in zip(active, losses, strict=True)]
        for lane, found in zip(active, seen, strict=True):
            look(forward, lane, watches[lane.name], found)
        for lane, count in zip(active, units, strict=True):
            _update(lane, count)
        yield from trained(forward, active, seen, clock)
        if any(lane.is_evaluation_due for lane in active):
            clock.pause()
            yield from evaluations(forward, active)
            forward.model.train()
            clock.resume()
    forward.between_steps()


@torch.no_grad()
def evaluate(
    forward: Forward, batches: list[Batch], name: str, by_row: list[dict[str, list[float]]] | None = None
) -> Figures:
    """The metrics over ``batches`` by the lane ``name``; ``loss`` is the mean in nats a prediction.

    What every row came to is added to ``by_row``, if given, a batch each.
    """
    forward.model.eval()
    found = []
    for batch, counts in forward.world.share(batches):
        forward.between_batches()
        here = _to_device(batch, forward.device)
        with forward.compute(), forward.route({name: _rows(batch)}):
            losses = forward.losses(forward.model, here)
        found += [(asdict(Sums().plus(losses)), {} if by_row is None else losses.by_row())] if counts else []
    gathered = forward.world.gathered(found)
    if by_row is not None:
        by_row += [rows for _, rows in gathered]
    sums = merged(Sums(**each) for each, _ in gathered)
    return {name: metric(sums) for name, metric in forward.metrics.items()}


def _accumulate(forward: Forward, lanes: list[Lane]) -> tuple[list[Tensor], list[int]]:
    """Gradients of one optimizer step. Each lane's loss is the mean over all its predictions of the step.

    Returns the losses and how many tokens (images, rows) each lane saw.
    """
    turns = [lane.timetable.micro_batches(lane.state.step + 1) for lane in lanes]  # of all processes
    drawn = [[next(lane.batches) for _ in forward.world.own(n)] for lane, n in zip(lanes, turns, strict=True)]
    found = forward.passes(forward, lanes, drawn)
    if forward.world.most(max(turns)) > max(map(len, drawn)):
        _keep_pace(forward, lanes[0])
    forward.world.sum_gradients(parameter for lane in lanes for parameter in lane.parameters)
    return [forward.world.summed(loss) for loss in found.losses], found.units


def passes(forward: Forward, lanes: Sequence[Lane], drawn: Sequence[Sequence[Batch]]) -> Passed:
    """Forward and backward passes over what each lane has drawn for one optimizer step."""
    counts, units = _totals(forward, drawn)
    losses = [torch.zeros((), device=forward.device) for _ in lanes]
    for turn in range(max(map(len, drawn))):
        having = [number for number, micro in enumerate(drawn) if turn < len(micro)]  # an epoch's end takes fewer
        batches = {lanes[number].name: drawn[number][turn] for number in having}
        totals = _row_totals(forward, batches)
        means = [total.sum() / max(counts[number], 1) for number, total in zip(having, totals, strict=True)]
        scaled = [_scaled(lanes[number], mean) for number, mean in zip(having, means, strict=True)]
        torch.stack(scaled).sum().backward()
        for number, mean in zip(having, means, strict=True):
            losses[number] = losses[number] + mean.detach()
    return Passed(losses, units)


def _totals(forward: Forward, drawn: Sequence[Sequence[Batch]]) -> tuple[list[int], list[int]]:
    """How many predictions, and tokens, each lane's part of the optimizer step has in all processes."""
    counts = [sum(int(forward.count(batch).sum()) for batch in micro) for micro in drawn]
    units = [sum(_tokens(batch) for batch in micro) for micro in drawn]
    totals = forward.world.totals([*counts, *units])
    return totals[: len(drawn)], totals[len(drawn) :]


def _keep_pace(forward: Forward, lane: Lane) -> None:
    """A pass that changes nothing: others have one more, and a sharded model's passes are all processes' together."""
    (totals,) = _row_totals(forward, {lane.name: lane.evaluation[0]})
    (totals.sum() * 0).backward()


def _row_totals(forward: Forward, batches: Mapping[str, Batch]) -> tuple[Tensor, ...]:
    """One pass over the lanes' batches: each one's losses by row."""
    rows = {name: _rows(batch) for name, batch in batches.items()}
    here = list(batches.values())
    batch = _to_device(here[0] if len(here) == 1 else forward.join(here), forward.device)
    with forward.compute(), forward.route(rows):
        total: Tensor = forward.losses(forward.model, batch).total
    if not total.requires_grad:
        raise UserError(
            "The loss depends on no trained parameter: the model reads the targeted weights without calling their "
            "layers, or gradients are cut off on the way. Choose targets that the model calls"
        )
    parts: tuple[Tensor, ...] = total.split(list(rows.values()))
    return parts


def _scaled(lane: Lane, loss: Tensor) -> Tensor:
    return loss if lane.scaler is None else lane.scaler.scale(loss)


def _clipped(lane: Lane, loss: Tensor) -> Seen:
    """The step's loss, gradient norm and learning rate, once the gradients are clipped."""
    if lane.scaler is not None:
        lane.scaler.unscale_(lane.optimizer)
    norm = nn.utils.clip_grad_norm_(lane.parameters, lane.max_grad_norm)
    return Seen(lane.state.step + 1, loss, norm, float(lane.schedule.get_last_lr()[0]))


def look(forward: Forward, lane: Lane, watch: Watch, found: Seen) -> None:
    """Check what the lane's last steps found, where somebody asks for it or it costs nothing."""
    watch.note(found)
    times = lane.timetable
    is_asked = times.logs(found.step) or times.evaluates(found.step) or times.saves(found.step)
    if is_asked or watch.is_full or _answers_at_once(forward.device):
        watch.check()


def _update(lane: Lane, units: int) -> None:
    """Change the lane's parameters; a step whose scaled gradients overflowed is left out, and its schedule waits."""
    if lane.scaler is None:
        lane.optimizer.step()
        lane.schedule.step()
    else:
        before = lane.scaler.get_scale()
        lane.scaler.step(lane.optimizer)
        lane.scaler.update()
        if lane.scaler.get_scale() >= before:
            lane.schedule.step()
    lane.optimizer.zero_grad(set_to_none=True)
    lane.state.step, lane.state.is_evaluated = lane.state.step + 1, False
    lane.state.units += units


def trained(forward: Forward, lanes: list[Lane], seen: list[Seen], clock: Clock) -> Iterator[Record]:
    """What the step just made found, of the lanes whose timetable has it logged."""
    logged = [(lane, found) for lane, found in zip(lanes, seen, strict=True) if lane.timetable.logs(found.step)]
    if not logged:
        return
    speed = clock.lap() / len(lanes)
    for lane, found in logged:
        values = {"train/loss": found.loss.item(), "train/grad_norm": found.norm.item(), "train/lr": found.rate}
        epochs = lane.timetable.epochs(found.step)
        values |= {} if epochs is None else {"train/epoch": epochs}
        yield {"lane": lane.name, "step": found.step, **values, f"train/{forward.unit}_per_s": speed}


def _answers_at_once(device: torch.device) -> bool:
    """Whether to read a value costs nothing: elsewhere the host would wait for the device at each step."""
    return device.type == "cpu"


def evaluations(forward: Forward, lanes: list[Lane]) -> Iterator[Record]:
    """Those that are due."""
    for lane in lanes:
        if lane.is_evaluation_due:
            record = _evaluated(forward, lane)
            lane.state.is_evaluated = True
            lane.state.best.note(record)
            yield record


def _evaluated(forward: Forward, lane: Lane) -> Record:
    step = lane.state.step

    def make() -> Figures:
        return evaluate(forward, lane.evaluation, lane.name)

    figures = make() if step else forward.at_start(make)
    loss = figures["loss"]
    if not math.isfinite(loss) and not step:
        raise DivergedError(
            f"eval/loss is {loss} (lane {lane.name}) before anything is trained: the base's weights are damaged "
            "(copy them anew), or overflow in this dtype (try model.dtype=float32)"
        )
    if not math.isfinite(loss):
        raise DivergedError(f"eval/loss became {loss} at optimizer step {step} (lane {lane.name}): lower optimizer.lr")
    return {"lane": lane.name, "step": step} | {f"eval/{name}": value for name, value in figures.items()}


def _rows(batch: Batch) -> int:
    return len(next(iter(batch.values())))


def _tokens(batch: Batch) -> int:
    return batch["labels"].numel()


def _concatenate(batches: Sequence[Batch]) -> Batch:
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
