"""What a model is asked: texts, messages of conversations, beginnings of held-out rows."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config, data_kinds
from lora_exp.data import kind_of
from lora_exp.data.kind import Ask
from lora_exp.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.use.loading import Trained

Message = Mapping[str, Any]
_ROLES = ("system", "developer", "user", "assistant", "tool")
STDIN = "-"


@dataclass(frozen=True)
class Prompt:
    """``ids``: the tokens that a model goes on from. ``asked``: them in words, or the messages behind them.

    ``ends``: tokens that end an answer. ``expected``: how held-out data goes on, if that is known.
    """

    asked: str | Sequence[Message]
    ids: list[int]
    ends: frozenset[int] = frozenset()
    expected: str | None = None

    @property
    def shown(self) -> str:
        """For a person: the text, or what was said last."""
        return self.asked if isinstance(self.asked, str) else str(self.asked[-1].get("content", ""))


@dataclass(frozen=True)
class Prompter:
    """Makes prompts for the model of a run. ``ask``: as conversations are laid out; None: texts are gone on from."""

    tokenizer: PreTrainedTokenizerBase
    ask: Ask | None
    system: str | None

    @classmethod
    def of(cls, trained: Trained, config: Config) -> Prompter:
        """As the run was trained, unless ``generate.chat`` says otherwise."""
        section, kind, tokenizer = config.generate, kind_of(config.data), trained.tokenizer
        ask = None if section.chat is False else kind.asks(tokenizer)
        if section.chat and ask is None:
            plain = kind_of(data_kinds["chat"](kind="chat", label="chat"))
            ask = plain.asks(tokenizer)
        if section.system and ask is None:
            raise UserError(
                "generate.system is a conversation's, and this run was trained on text: add generate.chat=true, or "
                "leave it out"
            )
        return cls(tokenizer, ask, section.system)

    def prompt(self, asked: str | Sequence[Message], expected: str | None = None) -> Prompt:
        """A text, or messages of which the last is to be answered."""
        if self.ask is None:
            if not isinstance(asked, str):
                raise UserError(
                    "messages are for a chat model, and this run was trained on text: add generate.chat=true"
                )
            return Prompt(asked, self._continued(asked), self._own_ends(), expected)
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [dict(each) for each in asked]
        if self.system and messages[0]["role"] not in ("system", "developer"):
            messages = [{"role": "system", "content": self.system}, *messages]
        text, ending = self.ask(messages)
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return Prompt(asked, self._checked(list(ids)), self._own_ends() | self._end(ending), expected)

    def opening(self, ids: list[int], rest: list[int]) -> Prompt:
        """Of a held-out row."""
        text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
        special = {token for token in rest[-1:] if token in self.tokenizer.all_special_ids}
        expected = str(self.tokenizer.decode(rest, skip_special_tokens=True))
        return Prompt(text, self._checked(ids), self._own_ends() | special, expected)

    def _continued(self, text: str) -> list[int]:
        ids = list(self.tokenizer(text)["input_ids"])
        if len(ids) > 1 and ids[-1] in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id):
            ids = ids[:-1]  # a tokenizer that ends every text, which is to go on
        if not ids and self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id]
        return self._checked(ids)

    def _checked(self, ids: list[int]) -> list[int]:
        if not ids:
            raise UserError("a prompt is empty, and the tokenizer has no token to begin with: give some text")
        return ids

    def _own_ends(self) -> frozenset[int]:
        return frozenset() if self.tokenizer.eos_token_id is None else frozenset({self.tokenizer.eos_token_id})

    def _end(self, ending: str) -> frozenset[int]:
        """The special token that ends an answer in the layout."""
        ids = self.tokenizer(ending, add_special_tokens=False)["input_ids"][:1] if ending else []
        return frozenset(token for token in ids if token in self.tokenizer.all_special_ids)


def given_prompts(config: Config, prompter: Prompter) -> list[Prompt]:
    """Those of the command line or of a file. Raises UserError for a file that cannot be read as such."""
    section = config.generate
    if section.prompt is not None:
        texts = section.prompt if isinstance(section.prompt, list) else [section.prompt]
        return [prompter.prompt(text) for text in texts]
    if section.file == STDIN:
        lines = sys.stdin.read().splitlines()
        return _nonempty([prompter.prompt(line) for line in lines if line.strip()], "standard input")
    if section.file is not None:
        return _nonempty(_of_file(Path(section.file).expanduser(), prompter), f"generate.file={section.file}")
    return []


def _of_file(file: Path, prompter: Prompter) -> list[Prompt]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"generate.file={file} cannot be read ({error}): give UTF-8 text") from None
    if file.suffix.lower() not in (".jsonl", ".ndjson"):
        return [prompter.prompt(line) for line in lines if line.strip()]
    return [_of_record(line, f"{file}:{place}", prompter) for place, line in enumerate(lines, 1) if line.strip()]


def _of_record(line: str, where: str, prompter: Prompter) -> Prompt:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f'{where} is not JSON ({error}): a line is {{"prompt": …}} or {{"messages": […]}}') from None
    found = record.get("messages", record.get("prompt")) if isinstance(record, dict) else None
    if isinstance(found, str):
        return prompter.prompt(found)
    if not isinstance(found, list) or not found or not all(_is_message(each) for each in found):
        raise UserError(
            f'{where} has no prompt: a line is {{"prompt": TEXT}} or {{"messages": [{{"role": …, "content": …}}]}}'
        )
    is_answered = len(found) > 1 and found[-1]["role"] == "assistant"
    messages, expected = (found[:-1], found[-1]["content"]) if is_answered else (found, None)
    return prompter.prompt(messages, expected)


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and value.get("role") in _ROLES and isinstance(value.get("content"), str)


def _nonempty(prompts: list[Prompt], where: str) -> list[Prompt]:
    if not prompts:
        raise UserError(f"{where} holds no prompt: give a line each")
    return prompts
