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

from torch import Tensor, nn

from lora_exp import models
from lora_exp.adapters import Given, LoraModel
from lora_exp.backends import name_base
from lora_exp.backends.class_names import FILE as CLASSES_FILE
from lora_exp.backends.targets import lora_config
from lora_exp.config import Config
from lora_exp.data import DataKind, kind_of
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.machine.place import Place, prepare_backends, resolve_device, resolve_place, set_seed
from lora_exp.machine.precision import take_precision
from lora_exp.models.source import Source
from lora_exp.schema import saved_config
from lora_exp.use.runs import FoundRun, find_run, names_of, said
from lora_exp.use.values import own_weights, swapped_in, take_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)
BASE = "base"  # what tables and commands call the base alone


@dataclass
class Trained:
    """``model`` has the adapters of ``runs``, by name; without any it is the base alone.

    Of runs that trained the base's own weights (``adapter=full``, ``head``) ``swapped`` holds those weights by run, and
    one at a time is in the model. ``digest``: of the base's weight files. ``shape``: what the runs' data asked of it.
    """

    model: nn.Module
    config: Config
    place: Place
    source: Source
    digest: str
    shape: Mapping[str, Any] = field(default_factory=dict)
    runs: dict[str, FoundRun] = field(default_factory=dict)
    swapped: dict[str, Mapping[str, Tensor]] = field(default_factory=dict)

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The first run's, which may have a chat template of its own; else the base's."""
        return tokenizer_of(self, next(iter(self.runs.values()), None))

    @property
    def names(self) -> list[str]:
        """The base and each run, in their order."""
        return [BASE, *self.runs]

    @contextlib.contextmanager
    def using(self, name: str) -> Iterator[nn.Module]:
        """The model by one adapter for a block; ``base``: exactly the base."""
        if name not in self.names:
            raise KeyError(name)
        with self._by_adapter(name) if isinstance(self.model, LoraModel) else self._by_weights(name):
            yield self.model

    @contextlib.contextmanager
    def _by_adapter(self, name: str) -> Iterator[None]:
        assert isinstance(self.model, LoraModel)
        if name == BASE:
            with self.model.disable_adapter():
                yield
            return
        before = self.model.active_adapter
        self.model.set_adapter(name)
        try:
            yield
        finally:
            if before is not None:
                self.model.set_adapter(before)

    def _by_weights(self, name: str) -> contextlib.AbstractContextManager[None]:
        return swapped_in(self.model, self.swapped.get(name, {}))


def load_trained(config: Config, only: int | None = None) -> Trained:
    """The base of ``config`` with the adapters that ``run`` names. ``only``: so many runs are allowed.

    Raises UserError for runs on different bases, or that cannot be had.
    """
    runs = [find_run(name, config.best, config.tracking) for name in names_of(config.run)]
    if only is not None and len(runs) != only:
        raise UserError(f"task={config.task} is about {only} run, and {len(runs)} are named: such as run=best")
    _check_one_base(runs)
    if len({_is_adapter(run) for run in runs}) > 1:
        raise UserError("run names adapters and runs that trained the base's own weights: use them one by one")
    for run in runs:
        log.info(said(run))
    with signals.at_once():
        take_precision(config.machine, resolve_device(config.device))
        place = resolve_place(
            config.device, config.model.dtype, not config.adapter.is_added, config.quantization.name != "none"
        )
        prepare_backends(place)
        source = models.find_source(config.model)
        set_seed(config.seed)  # of a new head, as the run had it before its first step
        shape = shape_in(runs[0].adapter if runs else None, kind_of(config.data))
        base = models.load_base(source, config.model, place, shape, config.quantization)
        digest = models.base_files_sha256(base, source)
    base.eval()
    base.requires_grad_(False)
    name_base(base, None if config.model.path else config.model.name)
    dtype = str(place.dtype).removeprefix("torch.")
    stored = dtype if config.quantization.name == "none" else f"{config.quantization.name} and {dtype}"
    log.info(f"model  {config.model.label} in {stored} on {place.device}, base_files_sha256 {digest[:12]}")
    with signals.at_once():
        return _with_runs(Trained(base, config, place, source, digest, shape), runs)


def tokenizer_of(trained: Trained, run: FoundRun | None) -> PreTrainedTokenizerBase:
    """The one that a run was saved with, which may have a chat template of its own; else, and for None, the base's."""
    if run is not None and (run.adapter / "tokenizer_config.json").is_file():
        own = replace(trained.config.model, path=str(run.adapter), packaged=None, name=None)
        return models.load_tokenizer(Source(str(run.adapter)), own)
    return models.load_tokenizer(trained.source, trained.config.model)


def add_run(trained: Trained, name: str, run: FoundRun) -> None:
    """Put the adapter of one more run beside the others. Raises UserError, and then nothing has changed."""
    _check_one_base([*trained.runs.values(), run])
    if not _is_adapter(run):
        raise UserError(f"run={run.place} trained the base's own weights: it cannot be put beside other adapters")
    try:
        _add(trained, name, run)
    except BaseException:
        if isinstance(trained.model, LoraModel) and name in trained.model.configs:
            trained.model.delete_adapter(name)
        raise
    trained.runs[name] = run
    trained.model.eval()


def _with_runs(trained: Trained, runs: Sequence[FoundRun]) -> Trained:
    for name, run in _names(runs).items():
        if _is_adapter(run):
            _add(trained, name, run)
        else:
            _note_weights(trained, name, run)
        trained.runs[name] = run
    trained.model.eval()
    return trained


def _is_adapter(run: FoundRun) -> bool:
    return (run.adapter / "adapter_config.json").is_file()


def _note_weights(trained: Trained, name: str, run: FoundRun) -> None:
    found = own_weights(run, trained.model, functools.partial(_whole, trained))
    trained.swapped[name] = found
    for key, parameter in trained.model.named_parameters(remove_duplicate=False):
        if key in found:  # as in training, by which the loss is taken where the head is trained
            parameter.requires_grad_(True)


def _add(trained: Trained, name: str, run: FoundRun) -> None:
    if run.step is not None and run.config.get("backend") == "native":
        _add_empty(trained, name, run)
    elif isinstance(trained.model, LoraModel):
        trained.model.load_adapter(run.adapter, name)
    else:
        trained.model = LoraModel.from_pretrained(trained.model, run.adapter, name, verbose=False)
    if run.step is not None:
        assert isinstance(trained.model, LoraModel)
        take_checkpoint(trained.model, name, run)


def _add_empty(trained: Trained, name: str, run: FoundRun) -> None:
    """An adapter as the run made it, for values of a checkpoint: a file may have them otherwise (VeRA's, scaled)."""
    assert run.folder is not None
    model, config = trained.model, saved_config(run.folder / "config.yaml")
    base = model.wrapped if isinstance(model, LoraModel) else model
    wanted = lora_config(replace(config, model=models.with_new_modules(config.model, base)))
    if isinstance(model, LoraModel):
        model.add_adapter(name, wanted, Given(fills=False))
    else:
        trained.model = LoraModel(model, wanted, name, verbose=False, given=Given(fills=False))


def _whole(trained: Trained, folder: Path) -> nn.Module:
    """A model that a run has trained all of."""
    section = replace(trained.config.model, path=str(folder), packaged=None, name=None)
    return models.load_base(Source(str(folder)), section, trained.place, trained.shape)


def _names(runs: Sequence[FoundRun]) -> dict[str, FoundRun]:
    """A name for each run, short where that tells them apart."""
    short = {run.slug: run for run in runs}
    if len(short) == len(runs) and BASE not in short:
        return short
    return {f"{run.slug}-{number}": run for number, run in enumerate(runs)}


def _check_one_base(runs: Sequence[FoundRun]) -> None:
    """Raise UserError for runs that were trained on different bases, as far as their configs say."""
    known = [(run, _base_of(run.config)) for run in runs if run.config]
    for run, base in known[1:]:
        if base != known[0][1]:
            raise UserError(
                f"run={run.place} was trained on {' and '.join(base)}, and run={known[0][0].place} on "
                f"{' and '.join(known[0][1])}: name runs of one base"
            )


def _base_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What tells bases apart, in words: which model, and how it is stored."""
    model, stored = config.get("model", {}), config.get("quantization", {}).get("name", "none")
    label = str(model.get("label") or model.get("name") or model.get("path"))
    return (label,) if stored == "none" else (label, str(stored))


def shape_in(folder: Path | None, kind: DataKind) -> Mapping[str, Any]:
    """What data of a ``kind`` asked of the model: its classes, as the folder with what was trained names them."""
    file = folder / CLASSES_FILE if folder is not None else None
    if file is None or not file.is_file():
        return kind.shape_of([])
    facts = json.loads(file.read_text(encoding="utf-8"))
    named = facts.get("id2label", {})
    padding = {"pad_token_id": facts["pad_token_id"]} if facts.get("pad_token_id") is not None else {}
    return {**kind.shape_of([named[key] for key in sorted(named, key=int)]), **padding}
