"""Where conversations come from beside files: data sets with a reader of their own, one file each in ``sources/``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from lora_exp.data.chat.conversations import Record
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
