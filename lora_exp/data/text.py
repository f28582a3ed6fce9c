"""Text for causal language models: read, split, tokenised once, cut into blocks.

Letters: N blocks, B of a batch, T tokens a block (``data.block_size``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import torch
from datasets import Dataset
from torch import Tensor

from lora_exp.data.records import read_documents, read_text
from lora_exp.data.split import cut, held_out
from lora_exp.errors import UserError
from lora_exp.inputs import text_files, text_path_problem
from lora_exp.machine.cache import cache_folder, file_sha256, made_once
from lora_exp.machine.packaged import find_packaged, install_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_exp.data.kinds.text import Text

log = logging.getLogger(__name__)
datasets.disable_progress_bars()

# Raised when blocks made by an older version of this file would differ.
_FORMAT = 2


@dataclass(frozen=True)
class Blocks:
    """Training and validation blocks, each a Dataset of N rows with ``input_ids`` (T,). They share no token."""

    train: Dataset
    validation: Dataset


def load_blocks(section: Text, tokenizer: PreTrainedTokenizerBase) -> Blocks:
    """Read, split, tokenise and cut the text, or take the result from the cache.

    Of JSON Lines whole documents are held out, evenly spread over all files; of a text file its last part.
    Raises UserError for a path that is missing, empty or too short for one block on each side.
    """
    files = _find_files(section)
    folder = cache_folder("datasets", section.label, _key(section, files, tokenizer), section.cache_dir)
    made_once(folder, lambda temporary: _tokenise(section, files, tokenizer, temporary))
    splits = datasets.load_from_disk(str(folder)).with_format("torch")
    return Blocks(splits["train"], splits["validation"])


def collate_blocks(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Blocks of T tokens → ``input_ids`` and ``labels``, both (B, T) int64: every token is predicted."""
    tokens = torch.stack([row["input_ids"] for row in rows]).long()
    return {"input_ids": tokens, "labels": tokens}


def _find_files(section: Text) -> list[Path]:
    if section.path:
        if problem := text_path_problem(section.path):
            raise UserError(problem)
        files, skipped = text_files(Path(section.path).expanduser())
        if skipped:
            named = ", ".join(file.name for file in skipped[:5]) + (", …" if len(skipped) > 5 else "")
            log.info(f"data   {len(skipped)} files in {section.path} are not read: {named}")
        return files
    assert section.packaged is not None
    packaged = find_packaged(section.packaged)
    if packaged is None:
        raise UserError(
            f"data={section.label} is not installed: {install_line(section.packaged)}, "
            "or take your own text with data=text data.path=FILE_OR_FOLDER"
        )
    return [packaged]


def _key(section: Text, files: list[Path], tokenizer: PreTrainedTokenizerBase) -> str:
    fast = getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    parts = [
        _FORMAT,
        [(file_sha256(file), file.suffix.lower()) for file in files],
        sorted(tokenizer.get_vocab().items()) if fast is None else fast.to_str(),
        tokenizer.eos_token_id,
        [section.text_field, list(section.group_by), section.block_size, section.val_fraction],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _tokenise(section: Text, files: list[Path], tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    train, validation = _split(section, files)
    splits = {
        "train": _blocks(train, "training", section, tokenizer),
        "validation": _blocks(validation, "validation", section, tokenizer),
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))


def _split(section: Text, files: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train on, and those held out."""
    train: list[str] = []
    validation: list[str] = []
    documents: list[str] = []
    for file in files:
        if file.suffix.lower() == ".jsonl":
            documents += read_documents(file, section)
        else:
            text = read_text(file)
            position = cut(text, section.val_fraction)
            train.append(text[:position])
            validation.append(text[position:])
    if len(documents) == 1 and not train:
        raise UserError(
            f"data={section.label} ({section.path or 'packaged'}) is a single document, of which none can be held out: "
            "give more lines (data.group_by makes one document of many), or a .txt file, whose last part is held out"
        )
    chosen = held_out(len(documents), section.val_fraction) if len(documents) > 1 else [False] * len(documents)
    train += [text for text, is_held_out in zip(documents, chosen, strict=True) if not is_held_out]
    validation += [text for text, is_held_out in zip(documents, chosen, strict=True) if is_held_out]
    return train, validation


def _blocks(texts: list[str], split: str, section: Text, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    encoded = tokenizer([text for text in texts if text.strip()] or [""], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = list(itertools.chain.from_iterable(ids + end for ids in encoded if ids))
    size = section.block_size
    if len(tokens) < size:
        raise UserError(
            f"The {split} text of data={section.label} ({section.path or 'packaged'}) has {len(tokens)} tokens, "
            f"fewer than one block of {size}: {_remedy(split)}"
        )
    rows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return Dataset.from_dict({"input_ids": rows}, features=features)


def _remedy(split: str) -> str:
    share = "raise" if split == "validation" else "lower"
    return f"give more text, lower data.block_size, or {share} data.val_fraction"
