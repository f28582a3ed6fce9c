"""A finished run's model: the frozen base as it was trained on, with the adapters of one run or of several on it."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_exp import models
from lora_exp.adapters import LoraModel
from lora_exp.adapters.files.safetensors import copy_strictly, read_tensors
from lora_exp.backends.class_names import FILE as CLASSES_FILE
from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.machine.place import Place, resolve_device, resolve_place, set_seed
from lora_exp.machine.precision import take_precision
from lora_exp.models.source import Source
from lora_exp.training.checkpoints import read
from lora_exp.use.runs import FoundRun, checkpoint_folder, find_run, names_of, said

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
BASE = "base"  # what tables and commands call the base alone


@dataclass
class Trained:
    """``model`` has the adapters of ``runs``, by name; without any it is the base alone.

    Of runs that trained the base's own weights (``adapter=full``, ``head``) ``swapped`` holds those weights by run, and
    one at a time is in the model. ``digest``: of the base's weight files.
    """

    model: nn.Module
    config: Config
    place: Place
    source: Source
    digest: str
    runs: dict[str, FoundRun] = field(default_factory=dict)
    swapped: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first run's, which may have a chat template of its own; else the base's."""
        return tokenizer_of(self, next(iter(self.runs.values()), None))

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """The model by one adapter for a block; ``base``: exactly the base."""
        if isinstance(self.model, LoraModel):
            if name == BASE:
                with self.model.disable_adapter():
                    yield self.model
                return
            before = self.model.active_adapter
            self.model.set_adapter(name)
            try:
                yield self.model
            finally:
                if before is not None:
                    self.model.set_adapter(before)
            return
        with _swapped_in(self.model, self.swapped.get(name, {})):
            yield self.model


def load_trained(config: Config, only: int | None = None) -> Trained:
    """The base of ``config`` with the adapters that ``run`` names. ``only``: so many runs are allowed.

    Raises UserError for runs on different bases, or that cannot be had.
    """
    runs = [find_run(name, config.best, config.tracking) for name in names_of(config.run)]
    if only is not None and len(runs) != only:
        raise UserError(f"task={config.task} is about {only} run, and {len(runs)} are named: such as run=best")
    for run in runs:
        log.info(said(run))
    with signals.at_once():
        take_precision(config.machine, resolve_device(config.device))
        place = resolve_place(
            config.device, config.model.dtype, not config.adapter.is_added, config.quantization.name != "none"
        )
        source = models.find_source(config.model)
        set_seed(config.seed)
        base = models.load_base(source, config.model, place, _shape(config, runs), config.quantization)
        digest = models.base_files_sha256(base, source)
    base.eval()
    base.requires_grad_(False)
    dtype = str(place.dtype).removeprefix("torch.")
    log.info(f"model  {config.model.label} in {dtype} on {place.device}, SHA-256 {digest[:12]}")
    return _with_adapters(Trained(base, config, place, source, digest), runs)


def tokenizer_of(trained: Trained, run: FoundRun | None) -> PreTrainedTokenizerBase:
    """The one that a run was saved with, which may have a chat template of its own; else, and for None, the base's."""
    if run is not None and (run.adapter / "tokenizer_config.json").is_file():
        own = replace(trained.config.model, path=str(run.adapter), packaged=None, name=None)
        return models.load_tokenizer(Source(str(run.adapter)), own)
    return models.load_tokenizer(trained.source, trained.config.model)


def add_run(trained: Trained, name: str, run: FoundRun) -> None:
    """Put the adapter of one more run beside the others. Raises UserError, and then nothing has changed."""
    _check_base(run, trained)
    if not (run.adapter / "adapter_config.json").is_file():
        raise UserError(f"run={run.place} trained the base's own weights: it cannot be put beside other adapters")
    try:
        _add(trained, name, run)
    except BaseException:
        if isinstance(trained.model, LoraModel) and name in trained.model.configs:
            trained.model.delete_adapter(name)
        raise
    trained.runs[name] = run
    trained.model.eval()


def _with_adapters(trained: Trained, runs: Sequence[FoundRun]) -> Trained:
    names = _names(runs)
    for name, run in names.items():
        _check_base(run, trained)
        if (run.adapter / "adapter_config.json").is_file():
            _add(trained, name, run)
        else:
            trained.swapped[name] = _weights(run, trained.model)
        trained.runs[name] = run
    if trained.swapped and isinstance(trained.model, LoraModel):
        raise UserError("run names adapters and runs that trained the base's own weights: use them one by one")
    trained.model.eval()
    return trained


def _add(trained: Trained, name: str, run: FoundRun) -> None:
    if isinstance(trained.model, LoraModel):
        trained.model.load_adapter(run.adapter, name)
    else:
        trained.model = LoraModel.from_pretrained(trained.model, run.adapter, name, verbose=False)
    if run.step is not None:
        _take_checkpoint(trained.model, name, run)


@torch.no_grad()
def _take_checkpoint(model: LoraModel, name: str, run: FoundRun) -> None:
    """Give an adapter the values that it had at an earlier step; the checkpoint names it ``default``."""
    assert run.folder is not None
    assert run.step is not None
    found = read(checkpoint_folder(run.folder, run.step)).state()["parameters"]
    known = dict(model.named_parameters()) | dict(model.named_buffers())
    for key, value in found.items():
        own = ".".join(name if part == "default" else part for part in key.split("."))
        if own not in known or known[own].shape != value.shape:
            raise UserError(f"{checkpoint_folder(run.folder, run.step)} does not fit its run's adapter ({key})")
        known[own].copy_(value)


def _names(runs: Sequence[FoundRun]) -> dict[str, FoundRun]:
    """A name for each run, short where that tells them apart."""
    short = {run.slug: run for run in runs}
    if len(short) == len(runs):
        return short
    return {f"{run.slug}-{number}": run for number, run in enumerate(runs)}


def _check_base(run: FoundRun, trained: Trained) -> None:
    """An adapter that says which files it was trained on is for no others."""
    outcome, config = run.outcome, trained.config
    theirs = outcome.values.get("model") if outcome is not None else None
    if theirs is not None and theirs != config.model.label:
        raise UserError(
            f"run={run.place} was trained on {theirs}, and the base here is {config.model.label}: name runs of one base"
        )


def _weights(run: FoundRun, base: nn.Module) -> Mapping[str, Tensor]:
    """What a run trained of the base's own weights, by name."""
    if run.step is not None:
        raise UserError(f"run={run.place}: an earlier checkpoint is taken of adapters alone: name the run itself")
    known = {**dict(base.named_parameters(remove_duplicate=False)), **dict(base.named_buffers())}
    files = sorted(run.adapter.glob("*.safetensors"))
    found: dict[str, Tensor] = {}
    for file in files:
        found |= read_tensors(file)[0]
    if wrong := [key for key in found if key not in known or known[key].shape != found[key].shape]:
        raise UserError(f"{run.adapter} holds {wrong[0]}, which does not fit the base: name the base it was trained on")
    return found


@contextlib.contextmanager
def _swapped_in(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Have ``model`` hold other values under the same names for a block."""
    known = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    before = {name: known[name].detach().clone() for name in tensors}
    copy_strictly(Path("the run's weights"), tensors, {name: known[name].detach() for name in tensors})
    try:
        yield
    finally:
        copy_strictly(Path("the base's weights"), before, {name: known[name].detach() for name in before})


def _shape(config: Config, runs: Sequence[FoundRun]) -> Mapping[str, Any]:
    """What the runs' data asked of the model: its classes, as the first run's folder names them."""
    kind, file = kind_of(config.data), runs[0].adapter / CLASSES_FILE if runs else None
    if file is None or not file.is_file():
        return kind.shape_of([])
    facts = json.loads(file.read_text(encoding="utf-8"))
    named = facts.get("id2label", {})
    padding = {"pad_token_id": facts["pad_token_id"]} if facts.get("pad_token_id") is not None else {}
    return {**kind.shape_of([named[key] for key in sorted(named, key=int)]), **padding}
