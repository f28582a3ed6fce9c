"""The tokenizer that goes with an export: its chat template is the layout that the run was trained with."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from lora_exp.data import kind_of
from lora_exp.models.kind import model_kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.use.loading import Trained


def exported_tokenizer(trained: Trained) -> PreTrainedTokenizerBase | None:
    """None of a kind of model that has none."""
    if not model_kind_of(trained.config.model).tokenises:
        return None
    tokenizer = copy.deepcopy(trained.tokenizer)
    template = kind_of(trained.config.data).chat_template(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer
