"""From what a request says to the tokens that are gone on with, for each name that can be asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jinja2

from lora_exp.data import kind_of
from lora_exp.data.kind import Ask
from lora_exp.errors import UserError
from lora_exp.schema import saved_config
from lora_exp.use.loading import Trained
from lora_exp.use.runs import FoundRun

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
_PLACEHOLDER = "qxz"


@dataclass(frozen=True)
class Prompts:
    """``ask``: how the training laid conversations out; None: by the tokenizer's own template. ``ends``: the tokens
    that end a text. ``words``: how many the vocabulary has."""

    tokenizer: PreTrainedTokenizerBase
    ask: Ask | None
    ends: frozenset[int]
    words: int

    def of_text(self, text: str) -> list[int]:
        """With what the tokenizer itself puts before a text. Raises UserError where nothing is left to go on from."""
        return self._checked(list(self.tokenizer(text, verbose=False)["input_ids"]))

    def of_tokens(self, tokens: Sequence[int]) -> list[int]:
        return self._checked(list(tokens))

    def of_messages(self, messages: Sequence[Message]) -> list[int]:
        """Raises UserError for messages that the layout refuses."""
        text = self._laid(messages)
        return self._checked(list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]))

    def decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def shown(self, token: int) -> str:
        """One token by itself, for lists of log-probabilities."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    @property
    def chat_ends(self) -> frozenset[int]:
        """Also the special token that closes an answer."""
        special = set(self.tokenizer.all_special_ids)
        closing = self.tokenizer(self._closing(), add_special_tokens=False, verbose=False)["input_ids"]
        return self.ends | (special & set(closing))

    def _laid(self, messages: Sequence[Message]) -> str:
        return self.ask([*messages])[0] if self.ask is not None else self._by_template(messages, asks=True)

    def _closing(self) -> str:
        """What the layout puts behind an answer."""
        question = {"role": "user", "content": _PLACEHOLDER}
        if self.ask is not None:
            return self.ask([question])[1]
        whole = self._by_template([question, {"role": "assistant", "content": _PLACEHOLDER}], asks=False)
        return whole.rpartition(_PLACEHOLDER)[2]

    def _by_template(self, messages: Sequence[Message], asks: bool) -> str:
        if not self.tokenizer.chat_template:
            raise UserError(
                "this model has no chat template: use /v1/completions, or an adapter trained on conversations"
            )
        try:
            text = self.tokenizer.apply_chat_template(list(messages), add_generation_prompt=asks, tokenize=False)
        except (jinja2.TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            raise UserError(f"the chat template refuses these messages ({type(error).__name__}: {error})") from None
        return str(text)

    def _checked(self, tokens: list[int]) -> list[int]:
        if not tokens:
            raise UserError("prompt is empty: there is nothing to go on from")
        if (largest := max(tokens)) >= self.words:
            raise UserError(f"the prompt holds the token {largest}, and the model has {self.words}, from 0")
        return tokens


def prompts_of(run: FoundRun | None, tokenizer: PreTrainedTokenizerBase, trained: Trained) -> Prompts:
    """``run`` None: the base's."""
    folder = None if run is None else run.folder
    section = None if folder is None else saved_config(folder / "config.yaml").data
    ask = kind_of(section).asks(tokenizer) if section is not None else None
    return Prompts(tokenizer, ask, _ends(tokenizer, trained), _words(trained))


def _ends(tokenizer: PreTrainedTokenizerBase, trained: Trained) -> frozenset[int]:
    """By the tokenizer, and by the base's generation config, which may name several."""
    settings: Any = getattr(trained.model, "generation_config", None)
    named = getattr(settings, "eos_token_id", None)
    known = named if isinstance(named, list) else [named]
    return frozenset(token for token in [tokenizer.eos_token_id, *known] if isinstance(token, int))


def _words(trained: Trained) -> int:
    facts: Any = trained.model.config.get_text_config()  # type: ignore[union-attr, operator]
    return int(facts.vocab_size)
