"""The tokenizer that goes with an export: its chat template is the layout that the run was trained with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lora_exp.data import kind_of
from lora_exp.models.kind import model_kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.use.loading import Trained

# ``lora_exp.data.chat.layouts.plain`` in Jinja.
PLAIN = (
    "{{ BEGIN }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '### Instruction:\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '### Response:\\n' }}{% endif %}{{ message['content'] }}"
    "{% if message.get('input') %}{{ '\\n\\n### Input:\\n' + message['input'] }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Response:\\n' }}{% endif %}"
)


def exported_tokenizer(trained: Trained) -> PreTrainedTokenizerBase | None:
    """None of a kind of model that has none."""
    if not model_kind_of(trained.config.model).tokenises:
        return None
    tokenizer = copy.deepcopy(trained.tokenizer)
    kind = kind_of(trained.config.data)
    if kind.kind != "chat":
        return tokenizer
    layout, template = kind.layout, kind.template  # type: ignore[attr-defined]
    if template:
        from lora_exp.data.chat.layouts import read_template

        tokenizer.chat_template = read_template(template)
    elif layout == "plain" or (layout == "auto" and not tokenizer.chat_template):
        begins = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = PLAIN.replace("{{ BEGIN }}", "{{ bos_token }}" if begins else "")
    return tokenizer
