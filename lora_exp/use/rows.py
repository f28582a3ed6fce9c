"""The rows that are looked at: a split of a run's data or of other data, and how many of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import OmegaConf
from torch.utils.data import ConcatDataset, Dataset

from lora_exp import models
from lora_exp.config import Config, ConfigError, DataConfig, conf_folder
from lora_exp.data import Data, DataKind, Row, kind_of, load_data
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.schema import data_section
from lora_exp.training.batches import evaluation_batches

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.training.objectives import Batch
    from lora_exp.use.loading import Trained

log = logging.getLogger(__name__)
ALL_OF_IT = "all"  # the split of data of which everything is looked at


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
    section, is_path = _data_named(named, kind_of(config.data).positions or 128)
    kind, own = kind_of(section), kind_of(config.data)
    if config.model.kind not in kind.learners or kind.new_head or own.new_head:
        raise UserError(
            f"evaluate.forget={named} ({kind.kind}) is not for a run on data={own.label} ({own.kind}): "
            "forgetting is looked at on text or conversations, by language models"
        )
    data = loaded(section, trained)
    rows: Dataset[Row] = ConcatDataset([data.train, data.validation]) if is_path else data.validation
    split = ALL_OF_IT if is_path else "validation"
    most = config.evaluate.rows if isinstance(config.evaluate.rows, int) else config.train.eval_blocks
    most = len(rows) if config.evaluate.rows == "all" else most  # type: ignore[arg-type]
    return Rows(section.label, split, kind, data, rows, min(most, len(rows)))  # type: ignore[arg-type]


def _data_named(name: str, block_size: int) -> tuple[DataConfig, bool]:
    """The data of a file in ``conf/data``, of a YAML file like those, or of a path to text in blocks of ``block_size``;
    and whether it is such a path, of which all is there to be looked at, half of it in each split.

    Raises ConfigError for none of them.
    """
    path = Path(name).expanduser()
    chosen = path if path.suffix == ".yaml" else conf_folder() / f"data/{name}.yaml"
    if chosen.is_file():
        return data_section(OmegaConf.create({"kind": "text", **OmegaConf.load(chosen)})), False
    if not path.exists():
        choices = ", ".join(sorted(file.stem for file in (conf_folder() / "data").glob("*.yaml")))
        raise ConfigError([f"evaluate.forget={name} is neither a path nor a choice of data: use one of {choices}"])
    given = {"kind": "text", "label": path.stem, "path": str(path), "block_size": block_size, "val_fraction": 0.5}
    return data_section(OmegaConf.create(given)), True


def loaded(section: DataConfig, trained: Trained) -> Data:
    """The data, tokenised as a training does."""
    tokenizers: list[PreTrainedTokenizerBase] = []

    def tokenizer() -> PreTrainedTokenizerBase:
        if not tokenizers:
            tokenizers.append(models.load_tokenizer(trained.source, trained.config.model))
        return tokenizers[0]

    with signals.at_once():
        return load_data(section, tokenizer)


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
