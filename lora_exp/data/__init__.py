"""One file a kind of data (``data.kind``): what a run trains on, as rows ready for a model.

A kind has ``load(section, tokenizer)``; ``tokenizer()`` loads the model's, for those that need one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch.utils.data import Dataset

from lora_exp.config import DataConfig


@dataclass(frozen=True)
class Data:
    """Training and validation rows, which share nothing. ``rows`` says what one is.

    ``shape``: what the model must be made to fit, such as its number of classes.
    """

    train: Dataset
    validation: Dataset
    rows: str
    shape: Mapping[str, int] = field(default_factory=dict)


def load_data(section: DataConfig, tokenizer: Callable[[], Any]) -> Data:
    """The rows of ``section``. Raises ValueError, with the next move, for data that cannot be had or used."""
    loaded: Data = import_module(f"{__name__}.{section.kind}").load(section, tokenizer)
    return loaded
