"""Records of every form as messages, and what is said of those that are none."""

from __future__ import annotations

from typing import Any

import pytest

from lora_exp.data.chat.conversations import BadRecordError, Fields, to_conversation

ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "instruction": ({"instruction": "a", "output": "b"}, [ASKED, ANSWERED]),
    "instruction, empty input": ({"instruction": "a", "input": "", "output": "b"}, [ASKED, ANSWERED]),
    "instruction, null input": ({"instruction": "a", "input": None, "output": "b"}, [ASKED, ANSWERED]),
    "instruction, input": ({"instruction": "a", "input": "c", "output": "b"}, [{**ASKED, "input": "c"}, ANSWERED]),
    "prompt": ({"prompt": "a", "completion": "b"}, [{**ASKED, "weight": 0}, ANSWERED]),
    "prompt of messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, [{**ASKED, "weight": 0}, ANSWERED]),
    "messages": ({"messages": [ASKED, ANSWERED], "id": 3}, [ASKED, ANSWERED]),
    "messages with more": (
        {"messages": [ASKED, {**ANSWERED, "reasoning_content": "c", "name": None}]},
        [ASKED, {**ANSWERED, "reasoning_content": "c"}],
    ),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, ANSWERED]}, [ASKED, ANSWERED],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, [ASKED, ANSWERED],
    ),
    "a call of a tool": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
                      {"role": "tool", "content": "3"}, ANSWERED]},
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]},
         {"role": "tool", "content": "3"}, ANSWERED],
    ),
}  # fmt: skip
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({}, "none of messages, completion, output is there (it has nothing)"),
    "other fields": ({"question": "a", "answer": "b"}, "it has question, answer): name what holds the answer"),
    "no instruction": ({"output": "b"}, "instruction is missing (it has output)"),
    "no prompt": ({"completion": "b"}, "prompt is missing"),
    "a number": ({"instruction": 3, "output": "b"}, "instruction is 3, not text"),
    "null": ({"instruction": "a", "output": None}, "output is None, not text"),
    "an empty answer": ({"instruction": "a", "output": " \n"}, "an answer is empty"),
    "one empty answer of two": (
        {"messages": [ASKED, ANSWERED, ASKED, {**ANSWERED, "content": ""}]},
        "an answer is empty",
    ),
    "no answer": ({"messages": [ASKED]}, "no message is the assistant's"),
    "no messages": ({"messages": []}, "messages is [], not a list of messages"),
    "text for messages": ({"messages": "hi"}, "messages is 'hi', not a list"),
    "text for a message": ({"messages": ["hi"]}, "messages[0] is 'hi', not a message"),
    "an unknown role": (
        {"messages": [{"role": "king", "content": "a"}]},
        "messages[0] has role='king', which is no role",
    ),
    "no role": ({"messages": [{"content": "a"}]}, "messages[0] has role=None"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "messages[0].content is [{'type': 'ima",
    ),
    "half a pair": ({"instruction": "\ud83d", "output": "b"}, "instruction holds half of a surrogate pair"),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form: str) -> None:
    record, messages = FORMS[form]
    assert to_conversation(record, Fields()).messages == messages


@pytest.mark.parametrize("case", BAD)
def test_bad_records(case: str) -> None:
    record, reason = BAD[case]
    with pytest.raises(BadRecordError) as caught:
        to_conversation(record, Fields())
    assert reason in str(caught.value)


def test_fields_have_other_names() -> None:
    names = Fields(instruction="question", output="answer", messages="turns", role="who", content="text")
    assert to_conversation({"question": "a", "answer": "b"}, names).messages == [ASKED, ANSWERED]
    turns = [{"who": "User", "text": "a"}, {"who": "Bot", "text": "b"}]
    assert to_conversation({"turns": turns}, names).messages == [ASKED, ANSWERED]


def test_a_system_message_is_set_before_those_that_have_none() -> None:
    system = {"role": "system", "content": "s"}
    record = {"instruction": "a", "output": "b"}
    assert to_conversation(record, Fields(), "s").messages == [system, ASKED, ANSWERED]
    own = {"messages": [{"role": "system", "content": "mine"}, ASKED, ANSWERED]}
    assert to_conversation(own, Fields(), "s").messages == own["messages"]


def test_tools_are_handed_on() -> None:
    record = {"messages": [ASKED, ANSWERED], "tools": [{"name": "f"}]}
    assert to_conversation(record, Fields()).tools == [{"name": "f"}]
