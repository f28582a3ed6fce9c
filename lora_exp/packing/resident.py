"""A job's base, tokenizer and rows; jobs that share a process read, hash, quantise and tokenise them once.

Each job has a twin of the base: the same frozen weights in modules of its own. So the resident one is never adapted,
and whatever a job, a library or a failure leaves behind is left in the twin. That its weights are what they were is
looked at again before each job.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_exp import models
from lora_exp.adapters.inspection.base_hash import Known, base_tensors
from lora_exp.adapters.numerics.fingerprints import Fingerprint
from lora_exp.config import Config, DataConfig, ModelConfig
from lora_exp.data import Data, Tokenizer, load_data
from lora_exp.models.twin import twin
from lora_exp.packing import shelf
from lora_exp.packing.lanes import evaluation_rows

if TYPE_CHECKING:
    from torch import nn

    from lora_exp.backends import Adapted
    from lora_exp.machine.place import Place
    from lora_exp.models import Source
    from lora_exp.training.loop import Figures

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Base:
    """``model`` is the job's own to adapt. ``digest`` is of its files; ``known``: what is known of its values."""

    model: nn.Module
    digest: str
    known: Known = field(default_factory=Known)


@dataclass(frozen=True)
class _Resident:
    base: Base
    values: Fingerprint


def source_of(section: ModelConfig) -> tuple[Source, Tokenizer]:
    """Where the model is read from, and what loads its tokenizer, once."""

    def find() -> tuple[Source, Tokenizer]:
        source = models.find_source(section)
        return source, functools.cache(lambda: models.load_tokenizer(source, section))

    here = shelf.current()
    return find() if here is None else here.take("source", section, find)


def data_of(section: DataConfig, model: ModelConfig, tokenizer: Tokenizer) -> Data:
    """The rows. Raises UserError for data that cannot be had or used."""
    here = shelf.current()
    if here is None:
        return load_data(section, tokenizer)
    return here.take("data", (section, model), lambda: load_data(section, tokenizer))


def base_of(config: Config, source: Source, place: Place, shape: Mapping[str, Any]) -> Base:
    """The base, to be adapted. One that is trained itself is read anew, and no other job has it."""

    def load() -> Base:
        model = models.load_base(source, config.model, place, shape, config.quantization)
        return Base(model, models.base_files_sha256(model, source))

    here = shelf.current()
    if here is None:
        return load()
    if not config.adapter.is_added:
        here.drop("base")
        return load()
    key = (config.model, config.quantization, place, dict(shape), _seed(config))
    resident = here.take("base", key, lambda: _resident(load()))
    if not resident.values.holds(base_tensors(resident.base.model)):
        log.warning("Something has written to the frozen base that jobs share: it is read anew")
        here.drop("base")
        del resident
        resident = here.take("base", key, lambda: _resident(load()))
    return Base(twin(resident.base.model), resident.base.digest, resident.base.known)


def another() -> nn.Module:
    """One more twin of the base that jobs share now."""
    here = shelf.current()
    resident: _Resident | None = None if here is None else here.held("base")
    assert resident is not None
    return twin(resident.base.model)


def at_start(config: Config, adapted: Adapted, place: Place) -> Callable[[Callable[[], Figures]], Figures]:
    """What takes the way to evaluate before the first step, and evaluates only where no job has seen the base do so."""
    here, section = shelf.current(), config.train
    if here is None or not adapted.starts_at_base:
        return lambda make: make()
    asked = section.eval_blocks, section.micro_batch_size, evaluation_rows(config), section.metrics
    key = (config.model, config.quantization, config.data, config.machine, place, _seed(config), asked)
    return lambda make: dict(here.take("figures", key, make))


def _seed(config: Config) -> int | None:
    """A new head is drawn, and then belongs to the base."""
    return config.seed if config.data.new_head else None


def _resident(base: Base) -> _Resident:
    return _Resident(base, Fingerprint(base_tensors(base.model)))
