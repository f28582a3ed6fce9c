"""Rows on disk: written piece by piece as they are made, and read from there without being in memory as a whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class RowWriter:
    """Writes rows of lists of whole numbers, named by ``columns``, to ``file``; a context manager."""

    def __init__(self, file: Path, *columns: str) -> None:
        from datasets.arrow_writer import ArrowWriter

        self.count = 0
        features = datasets.Features({name: datasets.List(datasets.Value("int32")) for name in columns})
        self._schema = features.arrow_schema
        self._writer = ArrowWriter(path=str(file), features=features)

    def write(self, columns: Mapping[str, list[np.ndarray] | np.ndarray]) -> None:
        """Rows by column: a list of rows (T,), of any lengths, or an array of them, (N, T)."""
        arrays = [_list_array(columns[name]) for name in self._schema.names]
        table = pyarrow.Table.from_arrays(arrays, schema=self._schema)
        self._writer.write_table(table)
        self.count += len(table)

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if not self.count:  # a file without its schema cannot be read
            self.write({name: [] for name in self._schema.names})
        self._writer.finalize()


def read_rows(file: Path) -> datasets.Dataset:
    """What a ``RowWriter`` has written, mapped from the disk; a row is a dict of tensors."""
    return datasets.Dataset.from_file(str(file)).with_format("torch")


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash that changes with what the tokenizer makes of a text."""
    fast = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    known = sorted(tokenizer.get_vocab().items()) if fast is None else fast.to_str()
    parts = [known, tokenizer.eos_token_id]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _list_array(rows: list[np.ndarray] | np.ndarray) -> pyarrow.ListArray:
    lengths = [len(row) for row in rows]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    values = np.concatenate(rows).astype(np.int32) if len(rows) else np.empty(0, np.int32)
    return pyarrow.ListArray.from_arrays(pyarrow.array(offsets), pyarrow.array(values))
