"""The chat template of an export is the layout that its run was trained with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_exp.config import Config, ModelConfig
from lora_exp.data.chat.conversations import Conversation
from lora_exp.data.chat.layouts import plain
from lora_exp.data.kinds.chat import Chat
from lora_exp.export.tokenizing import exported_tokenizer


def trained(tokenizer: Any, **data: Any) -> Any:
    return SimpleNamespace(tokenizer=tokenizer, config=Config(model=ModelConfig(), data=Chat(label="chats", **data)))


MESSAGES = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": "Name a ship.", "input": "Greek"},
    {"role": "assistant", "content": "Argo."},
    {"role": "user", "content": "Another?"},
    {"role": "assistant", "content": "None."},
]


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("layout", ["plain", "auto"])
def test_the_plain_layout_as_a_template(layout: str, begins: bool, tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    if begins:
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
        assert tokenizer("a")["input_ids"][0] == 1
    found = exported_tokenizer(trained(tokenizer, layout=layout))
    assert tokenizer.chat_template is None  # the run's own stays
    (laid,) = plain(tokenizer)(Conversation(MESSAGES))
    assert found.apply_chat_template(MESSAGES, tokenize=False) == laid.text
    asked = found.apply_chat_template(MESSAGES[:2], tokenize=False, add_generation_prompt=True)
    assert laid.text.startswith(asked)
    assert laid.text[len(asked) :].startswith("Argo.")


def test_a_template_of_ones_own_goes_along(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}")
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    found = exported_tokenizer(trained(tokenizer, template=str(file)))
    assert found.apply_chat_template(MESSAGES[:1], tokenize=False) == "<system>Be short."
    raw = exported_tokenizer(trained(tokenizer, layout="raw"))
    assert raw.chat_template is None
