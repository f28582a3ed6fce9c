"""Conversations of two people each (PyPI chitchat-dataset, MIT): who speaks second is learnt from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_exp.data.chat.source import Found, Source, chat_source, packaged_path
from lora_exp.data.split import SPLITS, shares

if TYPE_CHECKING:
    from lora_exp.data.kinds.chat import Chat


@chat_source("chitchat")
class Chitchat(Source):
    """What one says in a row is a message, its parts on lines of their own. Who never got an answer is left out."""

    def records(self, section: Chat, split: str) -> Found:
        conversations = json.loads(packaged_path(section).read_text(encoding="utf-8"))
        messages = {key: _messages(value["messages"]) for key, value in conversations.items()}
        answered = {key: value for key, value in messages.items() if len(value) > 1}
        divided = shares(len(answered), section.val_fraction, section.test_fraction)
        for share, (key, value) in zip(divided, answered.items(), strict=True):
            if SPLITS[share] == split:
                yield f"conversation {key}", {"messages": value}


def _messages(turns: list[list[dict[str, str]]]) -> list[dict[str, Any]]:
    """``turns``: lists of {text, sender}. Neighbouring ones of a sender are one message."""
    found: list[dict[str, Any]] = []
    first: str | None = None
    for sender, text in _said(turns):
        first = sender if first is None else first
        role = "user" if sender == first else "assistant"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += f"\n{text}"
        else:
            found.append({"role": role, "content": text})
    return found


def _said(turns: list[list[dict[str, str]]]) -> Iterator[tuple[str, str]]:
    for turn in turns:
        for each in turn:
            if text := each["text"].strip():
                yield each["sender"], text
