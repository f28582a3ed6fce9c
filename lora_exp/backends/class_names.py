"""What a head's outputs stand for, beside what was trained."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

FILE = "config.json"


def save_class_names(base: nn.Module, names: Sequence[str], folder: Path) -> None:
    """Write the classes' names to ``folder`` as transformers has them, in the base's config.

    ``AutoConfig.from_pretrained(folder)`` then makes ``AutoModelForSequenceClassification`` the head that the adapter
    was trained with. Of a base that is none of transformers' the names alone are written.
    """
    if not hasattr(base, "save_pretrained"):
        (folder / FILE).write_text(json.dumps({"id2label": dict(enumerate(names))}, indent=2) + "\n", encoding="utf-8")
        return
    facts = copy.deepcopy(cast("PreTrainedModel", base).config)
    if hasattr(facts, "quantization_config"):
        del facts.quantization_config  # of this run, not of the base's files
    facts.architectures = [type(base).__name__]
    facts.save_pretrained(folder)
