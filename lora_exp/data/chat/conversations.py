"""A record as a conversation, whatever its form: instruction and output, prompt and completion, or messages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Record = dict[str, object]
Message = dict[str, Any]  # role and content, of an instruction also its input; and whatever else a template reads
ANSWERS = "assistant"
_ROLES = {
    "human": "user", "user": "user", "prompter": "user", "gpt": ANSWERS, "assistant": ANSWERS, "chatgpt": ANSWERS,
    "model": ANSWERS, "bot": ANSWERS, "system": "system", "developer": "developer", "tool": "tool",
    "function": "tool", "observation": "tool", "ipython": "ipython",
}  # fmt: skip
_CALLS = ("tool_calls", "function_call")  # an answer that calls a tool says nothing


class BadRecordError(ValueError):
    """Why a record is no conversation."""


@dataclass(frozen=True)
class Fields:
    """What a record's parts are called. ``role`` and ``content`` are a message's; without them ``from`` and ``value``,
    as ShareGPT has them, are tried."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
    prompt: str = "prompt"
    completion: str = "completion"
    messages: str = "messages"
    role: str = "role"
    content: str = "content"
    tools: str = "tools"


@dataclass(frozen=True)
class Conversation:
    """``messages`` in order; ``tools``: what the answers may call, as templates take them."""

    messages: list[Message]
    tools: list[Any] | None = field(default=None)


def to_conversation(record: Record, names: Fields, system: str | None = None) -> Conversation:
    """The record's messages, after ``system`` if it has no such message of its own.

    Raises BadRecordError for one that is of no known form, or lacks an answer.
    """
    messages = _messages(record, names)
    if system and messages[0]["role"] not in ("system", "developer"):
        messages = [{"role": "system", "content": system}, *messages]
    answers = [message for message in messages if is_learnt(message)]
    if not answers:
        raise BadRecordError(f"no message is the {ANSWERS}'s: nothing is to be learnt")
    if any(not message["content"].strip() and not any(map(message.get, _CALLS)) for message in answers):
        raise BadRecordError("an answer is empty")
    tools = record.get(names.tools)
    return Conversation(messages, tools if isinstance(tools, list) and tools else None)


def is_learnt(message: Message) -> bool:
    """Whether it is an answer, and none of those that stand in a prompt or have the ``weight`` 0 (OpenAI's files)."""
    return bool(message["role"] == ANSWERS and message.get("weight", 1) != 0)


def _messages(record: Record, names: Fields) -> list[Message]:
    conversation = next((key for key in (names.messages, "conversations") if key in record), None)
    if conversation:
        return _listed(record[conversation], conversation, names)
    if names.completion in record:
        asked = [{**message, "weight": 0} for message in _side(record, names.prompt, "user", names)]
        return [*asked, *_side(record, names.completion, ANSWERS, names)]
    if names.output in record:
        instruction: Message = {"role": "user", "content": _text(record, names.instruction)}
        if record.get(names.input):
            instruction["input"] = _text(record, names.input)
        return [instruction, {"role": ANSWERS, "content": _text(record, names.output)}]
    has = ", ".join(map(str, list(record)[:12])) or "nothing"
    raise BadRecordError(
        f"none of {names.messages}, {names.completion}, {names.output} is there (it has {has}): name what holds the "
        "answer, such as data.fields.output=FIELD"
    )


def _side(record: Record, name: str, role: str, names: Fields) -> list[Message]:
    """A prompt or a completion: text, or messages."""
    if isinstance(record.get(name), list):
        return _listed(record[name], name, names)
    return [{"role": role, "content": _text(record, name)}]


def _text(record: Record, name: str) -> str:
    if name not in record:
        raise BadRecordError(f"{name} is missing (it has {', '.join(map(str, list(record)[:12]))})")
    value = record[name]
    if not isinstance(value, str):
        raise BadRecordError(f"{name} is {_shown(value)}, not text")
    return _checked(value, name)


def _checked(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRecordError(f"{name} holds half of a surrogate pair, which is no character") from None
    return text


def _listed(value: object, name: str, names: Fields) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise BadRecordError(f"{name} is {_shown(value)}, not a list of messages")
    return [_message(each, f"{name}[{index}]", names) for index, each in enumerate(value)]


def _message(value: object, place: str, names: Fields) -> Message:
    if not isinstance(value, Mapping):
        raise BadRecordError(f"{place} is {_shown(value)}, not a message")
    keys = [(names.role, names.content), ("from", "value")]
    role_key, content_key = next((pair for pair in keys if pair[0] in value), keys[0])
    role = _ROLES.get(str(value.get(role_key)).lower())
    if role is None:
        raise BadRecordError(f"{place} has {role_key}={_shown(value.get(role_key))}, which is no role")
    others = {key: each for key, each in value.items() if key not in (role_key, content_key) and each is not None}
    return {**others, "role": role, "content": _content(value.get(content_key), f"{place}.{content_key}")}


def _content(value: object, place: str) -> str:
    """Text as it is, or the texts among parts; of nothing the empty text, as beside a call of a tool."""
    if value is None:
        return ""
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(_content(part.get("text"), place) for part in value)
    if not isinstance(value, str):
        raise BadRecordError(f"{place} is {_shown(value)}, not text")
    return _checked(value, place)


def _shown(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}…"
