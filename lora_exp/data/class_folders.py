"""A folder a class, named as the class is: where texts or images of classes lie as files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import DataConfig
from lora_exp.data.broken import Broken
from lora_exp.data.formats import Read, Record
from lora_exp.data.sources import Source, sources_of
from lora_exp.inputs import class_folders, files_of, is_of_classes, weights_of, without_class_folders
from lora_exp.machine.cache import folder_sha256
from lora_exp.machine.packaged import find_packaged


@dataclass(frozen=True)
class ClassFolder:
    """The files of one class as a source of records, each made by ``read_one``, with ``label_field`` added."""

    path: Path
    weight: float
    label_field: str
    read_one: Callable[[Path], Record | Broken]

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self) -> Read:
        for file in files_of(self.path):
            record = self.read_one(file)
            yield str(file), record if isinstance(record, Broken) else {**record, self.label_field: self.path.name}

    def identity(self) -> list[object]:
        return [self.path.name, folder_sha256(self.path), self.weight]


def sources_of_classes(
    section: DataConfig, split: str, label_field: str, read_one: Callable[[Path], Record | Broken]
) -> list[Source]:
    """A source a class where ``section`` names folders of folders for this split, else as any kind of data has them.

    Raises UserError for what is missing.
    """
    named = section.path if split == "train" else getattr(section, f"{split}_path")
    if named is None and split == "train" and not section.name and section.packaged is not None:
        found = find_packaged(section.packaged)
        named = str(found) if found is not None else None
    paths = {Path(path).expanduser(): weight for path, weight in weights_of(named).items()}
    if not is_of_classes(named):
        return sources_of(without_class_folders(section), split)
    return [
        ClassFolder(folder, weight, label_field, read_one)
        for path, weight in paths.items()
        for folder in class_folders(path)
    ]


def ordered_classes(names: set[str]) -> tuple[str, ...]:
    """The classes in order: of their numbers if all are numbers, else of their names."""
    are_numbers = all(name.isdecimal() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))
