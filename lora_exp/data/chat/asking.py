"""A conversation that still lacks its answer, laid out as the training had it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_exp.data.chat.conversations import ANSWERS, BadRecordError, Conversation
from lora_exp.data.chat.layouts import Laid, Layout
from lora_exp.errors import UserError

_PLACEHOLDER = "x"


@dataclass(frozen=True)
class LaidOut:
    """``system``: the first message, where a conversation has no such."""

    lay: Layout
    system: str | None = None

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """The text up to where the answer begins. Raises UserError for messages that the layout refuses."""
        laid = self._answered(messages)
        return laid.text[: laid.answers[-1][0]]

    def closing(self) -> str:
        """What is learnt to be written behind an answer."""
        laid = self._answered([{"role": "user", "content": _PLACEHOLDER}])
        start, end = laid.answers[-1]
        return laid.text[start:end].partition(_PLACEHOLDER)[2]

    def _answered(self, messages: Sequence[Mapping[str, Any]]) -> Laid:
        told = [dict(message) for message in messages]
        if self.system and not any(message["role"] == "system" for message in told):
            told.insert(0, {"role": "system", "content": self.system})
        try:
            return self.lay(Conversation([*told, {"role": ANSWERS, "content": _PLACEHOLDER}]))[-1]
        except BadRecordError as error:
            raise UserError(f"these messages cannot be laid out: {error}") from None
