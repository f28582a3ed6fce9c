"""What a model may forget: data that it is not trained on, and what came of its loss there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from lora_exp.config import Config, ConfigError, DataConfig, conf_folder
from lora_exp.data import Data, DataKind, Row, Tokenizer, kind_of, load_data
from lora_exp.errors import UserError
from lora_exp.schema import data_section

if TYPE_CHECKING:
    from torch.utils.data import Dataset

    from lora_exp.training.objectives import Batch

PREFIX = "forget/"
ALL_OF_IT = "all"  # the split of data of which everything is looked at


@dataclass(frozen=True)
class Other:
    """Data of another ``kind`` or topic, and those ``rows`` of it that are looked at, its ``split``."""

    label: str
    split: str
    kind: DataKind
    rows: Dataset[Row]
    data: Data

    def batches(self, size: int, count: int) -> list[Batch]:
        """At most ``count`` rows, evenly spread, as micro batches of ``size``."""
        from lora_exp.training.batches import evaluation_batches

        have = len(self.rows)  # type: ignore[arg-type]
        return evaluation_batches(self.rows, size, min(count, have), False, self.kind.collate)


def forgotten_data(config: Config, tokenizer: Tokenizer) -> Other | None:
    """What ``data.forget`` names, if it does."""
    named = config.data.forget
    return None if named is None else other_data(named, "data.forget", config, tokenizer)


def other_data(named: str, key: str, config: Config, tokenizer: Tokenizer) -> Other:
    """What ``key=named`` names: what is held out of a dataset, or all of a path. Raises UserError."""
    from torch.utils.data import ConcatDataset

    section, is_path = _section_named(named, key, kind_of(config.data).positions or 128)
    if problem := _unfit(section, named, key, config):
        raise UserError(problem)
    data = load_data(section, tokenizer)
    rows: Dataset[Row] = ConcatDataset([data.train, data.validation]) if is_path else data.validation
    return Other(section.label, ALL_OF_IT if is_path else "validation", kind_of(section), rows, data)


def forget_problems(config: Config) -> list[str]:
    """What can be seen to be wrong with ``data.forget`` before anything is loaded."""
    named, key = config.data.forget, "data.forget"
    if named is None:
        return []
    try:
        section, _ = _section_named(named, key, kind_of(config.data).positions or 128)
    except ConfigError as error:
        return error.problems
    problem = _unfit(section, named, key, config)
    return [problem] if problem else []


def forgotten(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What came of it: the loss before and after, and by how much it rose (nats)."""
    found = [float(record[f"{PREFIX}loss"]) for record in records if f"{PREFIX}loss" in record]
    if len(found) < 2:
        return {}
    return {"forget_loss_before": found[0], "forget_loss": found[-1], "forgotten": found[-1] - found[0]}


def _unfit(section: DataConfig, named: str, key: str, config: Config) -> str | None:
    kind, own = kind_of(section), kind_of(config.data)
    if config.model.kind in kind.learners and not kind.new_head and not own.new_head:
        return None
    return (
        f"{key}={named} ({kind.kind}) is not for a run on data={own.label} ({own.kind}): forgetting is looked at on "
        "text or conversations, by language models"
    )


def _section_named(name: str, key: str, block_size: int) -> tuple[DataConfig, bool]:
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
        raise ConfigError([f"{key}={name} is neither a path nor a choice of data: use one of {choices}"])
    given = {"kind": "text", "label": path.stem, "path": str(path), "block_size": block_size, "val_fraction": 0.5}
    return data_section(OmegaConf.create(given)), True
