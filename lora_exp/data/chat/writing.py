"""What a model writes by itself for held-out questions, compared with the answers that are right.

Letters: B questions at a time, T positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lora_exp.data.chat.tokens import as_learnt
from lora_exp.registry import Registry

if TYPE_CHECKING:
    from torch.utils.data import Dataset
    from transformers import PreTrainedTokenizerBase

Judge = Callable[[str, str], float]
judges: Registry[Judge] = Registry("data.written", __name__)
judge = judges.add
_AT_ONCE = 16  # questions
_NUMBER = re.compile(r"####\s*(-?[\d,]*\.?\d+)")


@judge("number_match")
def number_match(written: str, right: str) -> float:
    """1 if the number behind the last ``####`` is the right one (GSM8K's exact match, arXiv:2110.14168)."""
    found, wanted = _number(written), _number(right)
    return float(wanted is not None and found == wanted)


@judge("exact_match")
def exact_match(written: str, right: str) -> float:
    """1 if both are the same text but for space around them."""
    return float(written.strip() == right.strip())


@dataclass(frozen=True)
class Question:
    """The tokens up to a row's last answer, and that answer."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Written:
    """Calling it lets a model answer ``questions``, by the likeliest token each time, and gives the means by judge."""

    questions: Sequence[Question]
    tokenizer: PreTrainedTokenizerBase
    names: Sequence[str]
    most: int

    def __call__(self, model: nn.Module, device: torch.device, between: Callable[[], object]) -> Mapping[str, float]:
        totals = dict.fromkeys(self.names, 0.0)
        for question, tokens in zip(self._by_length(), self._answers(model, device, between), strict=True):
            said, right = self._text(tokens), self._text(question.answer)
            for name in self.names:
                totals[name] += judges[name](said, right)
        return {name: total / len(self.questions) for name, total in totals.items()}

    def _text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def _by_length(self) -> list[Question]:
        """Those of about the same length are answered together."""
        return sorted(self.questions, key=lambda question: len(question.prompt))

    def _answers(self, model: nn.Module, device: torch.device, between: Callable[[], object]) -> Iterator[list[int]]:
        was_training, questions = model.training, self._by_length()
        model.eval()
        try:
            for start in range(0, len(questions), _AT_ONCE):
                between()
                yield from self._together(model, device, questions[start : start + _AT_ONCE])
        finally:
            model.train(was_training)

    @torch.no_grad()
    def _together(self, model: Any, device: torch.device, questions: list[Question]) -> list[list[int]]:
        ends = sorted(
            {question.answer[-1] for question in questions if question.answer[-1] in self._special} | self._ends
        )
        ids, mask = left_padded([question.prompt for question in questions])
        found = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=self.most,
            do_sample=False,
            use_cache=True,
            eos_token_id=ends or None,
            pad_token_id=ends[0] if ends else 0,
        )
        return [_until(row, ends) for row in found[:, ids.shape[1] :].tolist()]

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    @property
    def _ends(self) -> set[int]:
        return set() if self.tokenizer.eos_token_id is None else {self.tokenizer.eos_token_id}


def questions_of(rows: Dataset[dict[str, Tensor]], most: int) -> list[Question]:
    """Up to ``most`` questions, evenly spread over the rows."""
    have = len(rows)  # type: ignore[arg-type]
    count = min(most, have)
    return [_question(rows[index * have // count]) for index in range(count)]


def _question(row: dict[str, Tensor]) -> Question:
    stretches = as_learnt(row)
    last = max(index for index, (_, learnt) in enumerate(stretches) if learnt)
    prompt = [token for ids, _ in stretches[:last] for token in ids]
    return Question(prompt, stretches[last][0])


def left_padded(prompts: Sequence[Sequence[int]], padding: int = 0) -> tuple[Tensor, Tensor]:
    """``input_ids`` and ``attention_mask`` (B, T), so that the newest tokens are side by side."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def _until(tokens: list[int], ends: Sequence[int]) -> list[int]:
    place = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:place]


def _number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
