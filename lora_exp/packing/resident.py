"""A job's base, tokenizer and rows; jobs that share a process read, hash, quantise and tokenise them once.

Each job has a twin of the base: the same frozen weights in modules of its own. So the resident one is never adapted,
and whatever a job, a library or a failure leaves behind is left in the twin. That its weights are what they were is
looked at again before each job.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lora_exp import models
from lora_exp.adapters.inspection.base_hash import Known, base_tensors
from lora_exp.adapters.numerics.fingerprints import Fingerprint
from lora_exp.config import Config, DataConfig, ModelConfig
from lora_exp.data import Data, Tokenizer, load_data
from lora_exp.models.twin import twin
from lora_exp.packing import shelf

if TYPE_CHECKING:
    from torch import nn

    from lora_exp.machine.place import Place
    from lora_exp.models import Source

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
    seed = config.seed if "class_names" in shape else None  # a new head is drawn
    key = (config.model, config.quantization, place, dict(shape), seed)
    resident = here.take("base", key, lambda: _resident(load()))
    if not resident.values.holds(base_tensors(resident.base.model)):
        log.warning("Something has written to the frozen base that jobs share: it is read anew")
        here.drop("base")
        del resident
        resident = here.take("base", key, lambda: _resident(load()))
    return Base(twin(resident.base.model), resident.base.digest, resident.base.known)


def _resident(base: Base) -> _Resident:
    return _Resident(base, Fingerprint(base_tensors(base.model)))
