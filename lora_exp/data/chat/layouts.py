"""Conversations as text, with the stretches of it that are answers.

Where an answer lies is found by writing out the conversation up to it, never by a template's own ``generation`` marks:
stock templates have none.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.data.chat.conversations import ANSWERS, BadRecordError, Conversation, Message, is_learnt
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STAND_IN = "yes"  # for an answer that is not there yet
_DAY = datetime.date(2024, 7, 26)  # what templates take for today: the same data must give the same tokens tomorrow

# ``plain`` in Jinja.
_PLAIN = (
    "{{ BEGIN }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}{{ message['content'] }}"
    "{% if message.get('input') %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Laid:
    """``text``, and the ``(start, end)`` of the answers in it."""

    text: str
    answers: list[tuple[int, int]]


Layout = Callable[[Conversation], "list[Laid]"]
Render = Callable[["list[Message]", bool], str]


def plain(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """``### Instruction:``, ``### Input:`` and ``### Response:`` (github.com/tatsu-lab/stanford_alpaca)."""
    heads = {"user": "### Instruction:\n", ANSWERS: "### Response:\n"}

    def text_of(index: int, message: Message) -> tuple[str, str]:
        given = f"\n\n### Input:\n{message['input']}" if message.get("input") else ""
        return ("\n\n" if index else "") + heads.get(message["role"], ""), message["content"] + given

    return _one_after_another(tokenizer, text_of)


def plain_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same as a chat template."""
    return _PLAIN.replace("{{ BEGIN }}", "{{ bos_token }}" if _ends(tokenizer)[0] else "")


def raw(tokenizer: PreTrainedTokenizerBase) -> Layout:
    """The messages one after another as they are, an answer with its end: for prompts that are laid out already."""
    return _one_after_another(tokenizer, lambda index, message: ("", message["content"] + message.get("input", "")))


def _one_after_another(
    tokenizer: PreTrainedTokenizerBase, text_of: Callable[[int, Message], tuple[str, str]]
) -> Layout:
    """Of each message what stands before it, and its text, which is learnt with its end where it is an answer."""
    begin, end = _ends(tokenizer)

    def lay(conversation: Conversation) -> list[Laid]:
        text, answers = begin, []
        for index, message in enumerate(conversation.messages):
            head, content = text_of(index, message)
            start = len(text) + len(head)
            text += head + content + (end if message["role"] == ANSWERS else "")
            if is_learnt(message):
                answers.append((start, len(text)))
        return [Laid(text, answers)]

    return lay


def by_template(tokenizer: PreTrainedTokenizerBase, template: str | None, options: Mapping[str, Any]) -> Layout:
    """By the ``template``, or the tokenizer's own. ``options``: what it reads beside messages and tools.

    Where it writes an earlier answer otherwise once there is a later one (Qwen3 drops its thoughts), each answer
    becomes a text of its own, which ends with it: what the model will see before it, and writes.
    """

    def lay(conversation: Conversation) -> list[Laid]:
        return _laid(conversation.messages, _renderer(tokenizer, template, {**options, "tools": conversation.tools}))

    return lay


def question(lay: Layout, system: str | None, messages: Sequence[Message]) -> tuple[str, str]:
    """The text that asks for an answer to ``messages``, as one is asked for in training, and what ends the answer.

    Raises UserError for messages that the layout cannot take.
    """
    first = [{"role": "system", "content": system}] if system else []
    asked = [*([] if messages[0]["role"] in ("system", "developer") else first), *messages]
    try:
        laid = lay(Conversation([*asked, {"role": ANSWERS, "content": _STAND_IN}]))[-1]
    except BadRecordError as error:
        raise UserError(f"{error}: leave out the message that it does not take, such as the system's") from error
    start, end = laid.answers[-1]
    return laid.text[:start], laid.text[start:end].rpartition(_STAND_IN)[2]


def read_template(named: str) -> str:
    """The Jinja template in a file. Raises UserError for one that cannot be read."""
    try:
        return Path(named).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"data.template={named} cannot be read ({error}): name a Jinja file of a chat template"
        ) from None


def _laid(messages: list[Message], render: Render) -> list[Laid]:
    places = [index for index, message in enumerate(messages) if is_learnt(message)]
    text = render(messages, False)
    found = []
    for place in places:
        answer = _answer(text, messages[: place + 1], render, place + 1 == len(messages))
        if answer is None:
            break
        found.append(answer)
    else:
        return [Laid(text, found)]
    return [_last_alone(messages[: place + 1], render) for place in places]


def _last_alone(messages: list[Message], render: Render) -> Laid:
    text = render(messages, False)
    answer = _answer(text, messages, render, True)
    if answer is None:
        raise BadRecordError("the chat template writes an answer's beginning otherwise than what it is asked for with")
    return Laid(text, [answer])


def _answer(text: str, messages: list[Message], render: Render, is_whole: bool) -> tuple[int, int] | None:
    """Where in ``text``, which is all of them if ``is_whole``, the last of ``messages`` is; None where ``text`` does
    not begin as they do alone.

    A prompt that opens what the answer then leaves out, such as a thought, is followed as far as both agree.
    """
    until = text if is_whole else render(messages, False)
    prompt = render(messages[:-1], True) if messages[:-1] else ""
    start = _agreeing(prompt, until)
    if not text.startswith(until):
        return None
    if start < len(prompt) and start < len(render(messages[:-1], False)):
        return None
    return start, len(until)


def _agreeing(one: str, other: str) -> int:
    """How many characters both begin with."""
    if other.startswith(one):
        return len(one)
    return next(place for place, (left, right) in enumerate(zip(one, f"{other}\0", strict=False)) if left != right)


def _joined(message: Message) -> Message:
    """With an instruction's input below it."""
    rest = {key: value for key, value in message.items() if key not in ("input", "weight")}
    return {**rest, "content": f"{message['content']}\n\n{message['input']}"} if message.get("input") else rest


def _renderer(tokenizer: PreTrainedTokenizerBase, template: str | None, options: Mapping[str, Any]) -> Render:
    import jinja2

    chosen = _dated(tokenizer.get_chat_template(template, options.get("tools")))

    def render(messages: list[Message], asks: bool) -> str:
        try:
            text = tokenizer.apply_chat_template(
                [_joined(message) for message in messages],
                chat_template=chosen,
                add_generation_prompt=asks,
                tokenize=False,
                **options,
            )
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise BadRecordError(f"the chat template refuses it ({type(error).__name__}: {error})") from None
        assert isinstance(text, str)
        return text

    return render


def _dated(template: str) -> str:
    """With a fixed day wherever it writes today's, which no argument may set."""
    return re.sub(r"""strftime_now\(\s*(['"])(.*?)\1\s*\)""", lambda found: repr(_DAY.strftime(found[2])), template)


def _ends(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the tokenizer itself puts before a text, and the end of an answer."""
    first = tokenizer("a")["input_ids"][:1]
    begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
    return str(tokenizer.bos_token) if begins else "", str(tokenizer.eos_token or "")
