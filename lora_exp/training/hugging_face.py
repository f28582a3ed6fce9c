"""transformers' Trainer in this harness: its loop over our batches, and our records of what it does.

A trainer made on top of transformers' (TRL's) goes the same way: ``Harnessed`` is mixed in before it. What is drawn,
the optimizer, the schedule and the evaluations are those of the native trainer's lane. transformers' own part is the
loop: accumulation, backward passes, clipping, the order of updates.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainerControl, TrainingArguments

from lora_exp.errors import UserError
from lora_exp.training.reports import Reports

if TYPE_CHECKING:
    from lora_exp.training.loop import Lane
    from lora_exp.training.trainer import Work

_Arguments = TypeVar("_Arguments", bound=TrainingArguments)


class Harnessed(transformers.Trainer):
    """Mixed in before a Trainer. ``take`` gives it its work before it trains."""

    loss_is_scaled_for_ga = True  # every loss here is a sum over the predictions of a whole optimizer step

    def take(self, work: Work, reports: Reports) -> None:
        self.work, self.reports = work, reports

    def get_train_dataloader(self) -> Any:
        return _Batches(self.reports.lane)

    def compute_loss_context_manager(self) -> Any:
        return self.work.place.compute()

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.reports.before_batch(inputs)
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.reports.add(loss)
        return loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """A step's micro batches, and their predictions as the kind of data counts; transformers counts labels."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(int(self.work.kind.count(batch).sum()) for batch in batches)
        return batches, torch.tensor(max(count, 1), device=device)

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        norm: Tensor = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        self.reports.norm = norm
        return norm


class _Objective(Harnessed):
    """Minimises the kind of data's own losses."""

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        total: Tensor = self.work.kind.losses(model, inputs).total.sum()
        if not total.requires_grad:
            raise UserError(
                "The loss depends on no trained parameter: the model reads the targeted weights without calling their "
                "layers, or gradients are cut off on the way. Choose targets that the model calls"
            )
        loss: Tensor = total / num_items_in_batch
        return loss


def train_by_trainer(work: Work, reports: Reports) -> None:
    """Train with transformers' Trainer."""

    def make(folder: str) -> Harnessed:
        return _Objective(work.adapted.model, arguments_of(work, folder, TrainingArguments), **shared(reports))

    run(make, work, reports)


def run(make: Callable[[str], Harnessed], work: Work, reports: Reports) -> None:
    """Let the Trainer train that is made with a folder for what it may write though it is not asked to.

    To make one seeds the global generator, from which the native loop draws on.
    """
    if reports.lane.scaler is not None:
        raise UserError("a Trainer does not scale losses here, as float16 needs: use bfloat16 or trainer=native")
    model, devices = work.adapted.model, [work.place.device] if work.place.device.type == "cuda" else []
    with tempfile.TemporaryDirectory(prefix="lora_exp_trainer_") as folder, _restored(model):
        with torch.random.fork_rng(devices), _seen_as_adapted(model):
            trainer = make(folder)
        trainer.remove_callback(PrinterCallback)
        trainer.accelerator.device_placement = False  # all is where it belongs
        trainer.take(work, reports)
        try:
            trainer.train()
        finally:
            trainer.accelerator.free_memory()


def arguments_of(work: Work, folder: str, kind: type[_Arguments], **more: object) -> _Arguments:
    """The config as transformers' arguments: all that it would log, evaluate, save or seed by itself is off."""
    section = work.train
    wanted: dict[str, Any] = {
        "max_steps": work.timetable.steps,
        "per_device_train_batch_size": section.micro_batch_size,
        "gradient_accumulation_steps": section.grad_accum_steps,
        "max_grad_norm": section.max_grad_norm,
        "learning_rate": work.optimizer.lr,
        "seed": work.seed,
        "use_cpu": work.place.device.type == "cpu",
        "bf16": False,  # ``Place.compute`` is the context of a pass
        "fp16": False,
        _checkpointing(): False,  # the base has it already
        "report_to": "none",
        "logging_strategy": "no",
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
    }
    made = kind(folder, **wanted, **more)  # type: ignore[arg-type]
    if made.n_gpu > 1:
        made._n_gpu = 1  # or transformers spreads the rows over all of them (DataParallel)
    return made


def _checkpointing() -> str:
    """The argument's name, which transformers 5.23 has changed."""
    newer = "activation_checkpointing"
    return newer if newer in TrainingArguments.__dataclass_fields__ else "gradient_checkpointing"


def shared(reports: Reports) -> dict[str, Any]:
    """What every Trainer is given beside its model and arguments."""
    lane = reports.lane
    return {"optimizers": (lane.optimizer, lane.schedule), "callbacks": [_Follows(reports)]}


class _Follows(TrainerCallback):
    """Tells the reports where the loop is. An exception that it raises ends the training."""

    def __init__(self, reports: Reports) -> None:
        self._reports = reports

    def on_train_begin(self, *_: object, **__: object) -> None:
        self._reports.start()

    def on_step_begin(self, *_: object, **__: object) -> None:
        self._reports.before_step()

    def on_pre_optimizer_step(self, *_: object, **__: object) -> None:
        self._reports.look()

    def on_step_end(self, args: object, state: object, control: TrainerControl, **_: object) -> None:
        self._reports.stepped()
        control.should_training_stop = self._reports.lane.is_over


class _Batches:
    """The lane's batches, an epoch at a time, as a Trainer takes a loader. Without end where no epoch is known."""

    def __init__(self, lane: Lane) -> None:
        self._batches, self._count = lane.batches, lane.timetable.epoch_micro_batches

    def __len__(self) -> int:
        if self._count is None:
            raise TypeError("streamed rows have no number")
        return self._count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return map(dict, itertools.islice(self._batches, self._count))  # a Trainer adds to what it gets


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """What Trainers set on a model is gone afterwards: marks, other forwards, its config's ``use_cache``."""
    models = {model, transformers_model(model)}
    before, config = {one: dict(vars(one)) for one in models}, getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    try:
        yield
    finally:
        for one, attributes in before.items():
            for name in vars(one).keys() - attributes.keys():
                delattr(one, name)
            vars(one).update({name: attributes[name] for name in ("forward",) if name in attributes})
        if use_cache is not None:
            config.use_cache = use_cache  # type: ignore[union-attr]


def transformers_model(model: nn.Module) -> nn.Module:
    """The model of transformers in an adapted one; one that is none of theirs is itself."""
    return next((module for module in model.modules() if isinstance(module, PreTrainedModel)), model)


@contextlib.contextmanager
def _seen_as_adapted(model: nn.Module) -> Iterator[None]:
    """A Trainer refuses a quantised model without an adapter, and knows no adapters but PEFT's."""
    mark = "_hf_peft_config_loaded"
    if not getattr(model, "is_quantized", False) or hasattr(model, "peft_config"):
        yield
        return
    setattr(model, mark, True)
    try:
        yield
    finally:
        delattr(model, mark)
