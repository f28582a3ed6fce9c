"""Text for causal language models: read, split, tokenised once, cut into blocks.

Letters: N blocks, B of a batch, T tokens a block (``data.block_size``).
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from lora_exp.data.broken import BadRecords
from lora_exp.data.documents import Texts
from lora_exp.data.rows import RowWriter, read_rows, tokenizer_identity
from lora_exp.data.sources import fingerprint, source_name
from lora_exp.data.split import SPLITS
from lora_exp.errors import UserError
from lora_exp.machine.cache import cache_folder, made_once

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.data.kinds.text import Text

datasets.disable_progress_bars()

# Raised when blocks made by an older version of this file would differ.
_FORMAT = 3
_FACTS = "facts.json"
_BATCH = 2**20  # characters that are tokenised at once
_SHOWN = 150  # characters of the example
_OPENING = 16  # tokens that a model is given to go on from


@dataclass(frozen=True)
class Blocks:
    """Training, validation and test blocks, each a Dataset of N rows with ``input_ids`` (T,). They share no token."""

    train: Dataset
    validation: Dataset
    test: Dataset | None = None
    fingerprint: str = ""
    said: list[str] = field(default_factory=list)


def load_blocks(section: Text, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Read, split, tokenise and cut the text, or take the result from the cache, where it is read from while in use.

    Of records whole documents are held out, evenly spread over all files; of a text file its last part.
    Raises UserError for sources that are missing, broken or too short for one block on each side.
    """
    key = fingerprint(section, _FORMAT, tokenizer_identity(tokenizer))
    folder = cache_folder("datasets", section.label, key, section.cache_dir)
    made_once(folder, lambda temporary: _tokenise(section, tokenizer, temporary))
    splits = {split: read_rows(file) for split in SPLITS if (file := folder / f"{split}.arrow").exists()}
    facts = json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    return Blocks(splits["train"], splits["validation"], splits.get("test"), key, facts["said"])


def collate_blocks(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of T tokens → ``input_ids`` and ``labels``, both (B, T) int64: every token is predicted."""
    tokens = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": tokens, "labels": tokens}


def openings(blocks: Dataset, count: int) -> list[tuple[list[int], list[int]]]:
    """The first tokens of up to ``count`` blocks, evenly spread, and the rest of each."""
    count = min(count, len(blocks))
    found = [blocks[index * len(blocks) // count]["input_ids"].tolist() for index in range(count)]
    return [(ids[:cut], ids[cut:]) for ids in found for cut in [min(_OPENING, len(ids) // 2)]]


def example(blocks: Dataset, tokenizer: PreTrainedTokenizerBase) -> str:
    """The beginning of the first block, decoded, in one line."""
    text = " ".join(str(tokenizer.decode(blocks[0]["input_ids"])).split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _tokenise(section: Text, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    bad = BadRecords(section.max_bad_fraction)
    texts = Texts(section, bad)
    for split in texts.splits:
        _write_blocks(texts.of(split), split, section, tokenizer, folder / f"{split}.arrow")
    facts = {"said": [*texts.said, *bad.said()]}
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _write_blocks(
    texts: Iterator[tuple[str, bool]], split: str, section: Text, tokenizer: PreTrainedTokenizerBase, file: Path
) -> None:
    size, count, rest = section.block_size, 0, np.empty(0, np.int32)
    with RowWriter(file, "input_ids") as rows:
        for tokens in _tokens(texts, tokenizer):
            count += len(tokens)
            rest = np.concatenate([rest, tokens])
            if whole := len(rest) // size * size:
                rows.write({"input_ids": rest[:whole].reshape(-1, size)})
                rest = rest[whole:]
    if count < size:
        name = "training" if split == "train" else split
        raise UserError(
            f"The {name} text of data={section.label} ({source_name(section)}) has {count} "
            f"tokens, fewer than one block of {size}: {_remedy(split, section)}"
        )


def _tokens(texts: Iterator[tuple[str, bool]], tokenizer: PreTrainedTokenizerBase) -> Iterator[np.ndarray]:
    """Tokens of many texts at once, (anything,), with the end of a document behind each that ends one."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for batch in _batches(texts):
        encoded = tokenizer([text for text, _ in batch], add_special_tokens=False, verbose=False)["input_ids"]
        ended = (ids + end if ends else ids for ids, (_, ends) in zip(encoded, batch, strict=True) if ids)
        yield np.fromiter(itertools.chain.from_iterable(ended), np.int32)


def _batches(texts: Iterator[tuple[str, bool]]) -> Iterator[list[tuple[str, bool]]]:
    batch: list[tuple[str, bool]] = []
    length = 0
    for text, ends in texts:
        batch.append((text, ends))
        length += len(text) + 1
        if length >= _BATCH:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _remedy(split: str, section: Text) -> str:
    if split != "train" and (getattr(section, f"{split}_path") or getattr(section, f"{split}_split")):
        return "give more text, or lower data.block_size"
    share = "data.test_fraction" if split == "test" else "data.val_fraction"
    return f"give more text, lower data.block_size, or {'lower' if split == 'train' else 'raise'} {share}"
