"""What a model writes by itself: which question it is asked, where it ends, and how it is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_exp.data.chat.writing import Question, Written, judges, number_match, questions_of
from lora_exp.training.objectives import IGNORED


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    made = AutoModelForCausalLM.from_pretrained(tiny_llama)
    made.config.use_cache = False
    return made.train()


@pytest.mark.parametrize(
    ("written", "right", "value"),
    [
        ("so 2+2 = 4\n#### 4", "…\n#### 4", 1.0),
        ("#### 5\n#### 4", "#### 4", 1.0),
        ("#### 1,200", "#### 1200", 1.0),
        ("####4.0", "#### 4", 1.0),
        ("#### -4", "#### 4", 0.0),
        ("#### 40", "#### 4", 0.0),
        ("the answer is 4", "#### 4", 0.0),
        ("nothing", "nothing", 0.0),
        ("#### .5 apples", "#### 0.5", 1.0),
        ("#### $18", "#### 18", 0.0),
    ],
)
def test_number_match(written: str, right: str, value: float) -> None:
    assert number_match(written, right) == value


def test_the_last_answer_of_a_row_is_asked_for() -> None:
    row = {
        "input_ids": torch.tensor([1, 5, 6, 7, 8, 9]),
        "labels": torch.tensor([IGNORED, 5, IGNORED, IGNORED, 8, 9]),
    }
    rows: Any = [row] * 10
    assert questions_of(rows, 3) == [Question([1, 5, 6, 7], [8, 9])] * 3
    assert len(questions_of(rows, 30)) == 10


def asked(count: int) -> list[Question]:
    return [Question(list(range(5, 7 + index)), [9, 2]) for index in range(count)]


def test_questions_answered_together_are_answered_as_one_by_one(model: Any, tokenizer: Any) -> None:
    """Against transformers' own generate on a single row, which needs no padding."""
    questions, device = asked(20), torch.device("cpu")
    together = list(Written(questions, tokenizer, [], 8)._answers(model, device, lambda: None))
    for question, answer in zip(questions, together, strict=True):
        alone = model.eval().generate(
            torch.tensor([question.prompt]), attention_mask=torch.ones(1, len(question.prompt), dtype=torch.long),
            max_new_tokens=8, do_sample=False, use_cache=True, eos_token_id=2, pad_token_id=2,
        )[0, len(question.prompt) :].tolist()  # fmt: skip
        assert answer == [token for token in alone if token != 2]


def test_judges_are_averaged_and_the_model_trains_on(model: Any, tokenizer: Any) -> None:
    looked: list[int] = []
    written = Written(asked(17), tokenizer, ["number_match", "exact_match"], 4)
    model.train()
    assert written(model, torch.device("cpu"), lambda: looked.append(1)) == {"number_match": 0.0, "exact_match": 0.0}
    assert len(looked) == 2
    assert model.training
    assert not model.config.use_cache


def test_right_answers_count(model: Any, tokenizer: Any) -> None:
    """What the model writes itself is the right answer."""
    (answer,) = Written(asked(1), tokenizer, [], 6)._answers(model, torch.device("cpu"), lambda: None)
    own = Question(asked(1)[0].prompt, answer)
    assert Written([own], tokenizer, ["exact_match"], 6)(model, torch.device("cpu"), lambda: None) == {
        "exact_match": 1.0
    }


def test_judges_are_known() -> None:
    assert judges.names() == ["exact_match", "number_match"]
