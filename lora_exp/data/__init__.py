"""What a run trains on: one file a kind (``data.kind``) in ``kinds/``, and beside it how each kind is read."""

from __future__ import annotations

from lora_exp.config import DataConfig
from lora_exp.data.kind import Batch, Data, DataKind, Row, Tokenizer, data_kind, kind_of

__all__ = ["Batch", "Data", "DataKind", "Row", "Tokenizer", "data_kind", "kind_of", "load_data"]


def load_data(section: DataConfig, tokenizer: Tokenizer) -> Data:
    """The rows of ``section``. Raises UserError, with the next move, for data that cannot be had or used."""
    return kind_of(section).load(tokenizer)
