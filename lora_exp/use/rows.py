"""The rows that are looked at: a split of a run's data or of other data, and how many of it."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch.utils.data import Dataset

from lora_exp import models
from lora_exp.config import Config, DataConfig
from lora_exp.data import Data, DataKind, Row, kind_of, load_data
from lora_exp.errors import UserError
from lora_exp.forgetting import other_data
from lora_exp.machine import signals
from lora_exp.training.batches import evaluation_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.training.objectives import Batch
    from lora_exp.use.loading import Trained

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rows:
    """``rows`` of a ``split`` of ``data``, of which the first ``count``, evenly spread, are looked at."""

    label: str
    split: str
    kind: DataKind
    data: Data
    rows: Dataset[Row]
    count: int

    def batches(self, size: int) -> list[Batch]:
        """As micro batches of ``size`` rows, the same ones as in training."""
        return evaluation_batches(self.rows, size, self.count, False, self.kind.collate)

    @property
    def total(self) -> int:
        return len(self.rows)  # type: ignore[arg-type]


def asked_rows(trained: Trained, config: Config) -> Rows:
    """Those of ``evaluate.split``. Raises UserError where there are none, or they are of other classes."""
    section, data = config.evaluate, loaded(config.data, trained)
    found = {"train": data.train, "validation": data.validation, "test": data.test}[section.split]
    if found is None or not len(found):  # type: ignore[arg-type]
        raise UserError(
            f"data={config.data.label} has no {section.split} rows: name some by data.{section.split}_path=FILE "
            "(data.test_fraction would take them from what the run was trained on)"
        )
    _check_classes(data, trained, config.data.label)
    return Rows(config.data.label, section.split, kind_of(config.data), data, found, _count(config, found))


def forgotten_rows(trained: Trained, config: Config) -> Rows | None:
    """Those of ``evaluate.forget``: what is held out of a dataset, or all of a path."""
    named = config.evaluate.forget
    if named is None:
        return None
    with signals.at_once():
        other = other_data(named, "evaluate.forget", config, functools.cache(lambda: _tokenizer(trained)))
    most = config.evaluate.rows if isinstance(config.evaluate.rows, int) else config.train.eval_blocks
    have = len(other.rows)  # type: ignore[arg-type]
    most = have if config.evaluate.rows == "all" else most
    return Rows(other.label, other.split, other.kind, other.data, other.rows, min(most, have))


def loaded(section: DataConfig, trained: Trained) -> Data:
    """The data, tokenised as a training does."""
    with signals.at_once():
        return load_data(section, functools.cache(lambda: _tokenizer(trained)))


def _tokenizer(trained: Trained) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(trained.source, trained.config.model)


def _count(config: Config, rows: Dataset[Row]) -> int:
    """How many are looked at."""
    asked, have = config.evaluate.rows, len(cast(Any, rows))
    if asked is None:
        asked = have if config.evaluate.split == "test" else config.train.eval_blocks
    return have if asked == "all" else min(int(asked), have)


def _check_classes(data: Data, trained: Trained, label: str) -> None:
    """A head's outputs stand for the classes that it was trained on."""
    here, theirs = data.shape.get("class_names"), trained.shape.get("class_names")
    if here is not None and theirs is not None and list(map(str, here)) != list(map(str, theirs)):
        raise UserError(
            f"data={label} has the classes {', '.join(map(str, here))}, and the run's head has "
            f"{', '.join(map(str, theirs))}: name data of the same classes"
        )
