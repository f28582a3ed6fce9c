"""A split of a dataset of the hub, or of a local folder in hub layout, read through ``datasets``."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_exp.config import DataConfig
from lora_exp.data.broken import Broken
from lora_exp.errors import UserError
from lora_exp.machine.cache import cache_root, file_sha256

if TYPE_CHECKING:
    import datasets

_ROWS = 1000


@dataclass(frozen=True)
class HubSource:
    """``label`` is "NAME (SPLIT)", for messages."""

    label: str
    table: datasets.Dataset
    weight: float = 1.0

    @property
    def name(self) -> str:
        return self.label

    def read(self) -> Iterator[tuple[str, dict[str, object] | Broken]]:
        number = 0
        for columns in self.table.iter(batch_size=_ROWS):
            for values in zip(*columns.values(), strict=True):
                number += 1
                yield f"{self.label}, row {number}", dict(zip(columns, values, strict=True))

    def identity(self) -> list[object]:
        files = [file["filename"] for file in self.table.cache_files]
        return [_hashes(tuple(files)) or self.table._fingerprint, len(self.table)]


def hub_source(section: DataConfig, split: str) -> HubSource:
    """Raises UserError for a dataset, a subset or a split that cannot be had."""
    where = str(cache_root(section.cache_dir) / "hub") if section.cache_dir else None
    table = _load(str(section.name), section.subset, section.revision, split, where)
    return HubSource(f"{section.name} ({split})", table)


@functools.lru_cache(maxsize=8)
def _load(name: str, subset: str | None, revision: str | None, split: str, cache: str | None) -> datasets.Dataset:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(name, subset, revision=revision, split=split, cache_dir=cache)
    except Exception as error:  # of many libraries: the network, the file formats, the hub's own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        named = f"data.name={name}" + (f" data.subset={subset}" if subset else "") + f", split {split},"
        raise UserError(
            f"{named} cannot be had ({reason}): mend the name, the split (data.split, data.validation_split, "
            "data.test_split) or the connection, or take files of your own by data.path"
        ) from error


@functools.lru_cache(maxsize=8)
def _hashes(files: tuple[str, ...]) -> tuple[str, ...]:
    from pathlib import Path

    return tuple(file_sha256(Path(file)) for file in files)
