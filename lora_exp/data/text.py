"""Text for causal language models: read, split, tokenised once, cut into blocks.

Letters: N blocks, T tokens a block (``data.block_size``).
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset

from lora_exp.cache import cache_root, file_sha256, made_once
from lora_exp.config import DataConfig
from lora_exp.data import Data
from lora_exp.packaged import find_packaged, install_line

datasets.disable_progress_bars()

SUFFIXES = (".txt", ".md", ".jsonl")
# Raised when blocks made by an older version of this file would differ.
_FORMAT = 1


@dataclass(frozen=True)
class Blocks:
    """Training and validation blocks, each a Dataset of N rows with ``input_ids`` (T,). They share no token."""

    train: Dataset
    validation: Dataset


def load(section: DataConfig, tokenizer: Callable[[], Any]) -> Data:
    """``load_blocks`` as data for a run."""
    blocks = load_blocks(section, tokenizer())
    return Data(blocks.train, blocks.validation, f"blocks of {section.block_size} tokens")


def load_blocks(section: DataConfig, tokenizer: Any) -> Blocks:
    """Read, split, tokenise and cut the text, or take the result from the cache.

    Of JSON Lines every k-th document is held out (k = 1 / val_fraction, rounded); of a text file its last
    ``val_fraction``. Raises ValueError for a path that is missing, empty or too short for one block.
    """
    files = _find_files(section)
    folder = cache_root(section.cache_dir) / "datasets" / _key(section, files, tokenizer)
    made_once(folder, lambda temporary: _tokenise(section, files, tokenizer, temporary))
    splits = datasets.load_from_disk(str(folder)).with_format("torch")
    return Blocks(splits["train"], splits["validation"])


def _find_files(section: DataConfig) -> list[Path]:
    if not section.path:
        assert section.packaged is not None
        packaged = find_packaged(section.packaged)
        if packaged is None:
            raise ValueError(
                f"data={section.label} is not installed: {install_line(section.packaged)}, "
                "or take your own text with data=text data.path=FILE_OR_FOLDER"
            )
        return [packaged]
    path = Path(section.path).expanduser()
    if not path.exists():
        raise ValueError(f"data.path={section.path} does not exist: name a file or a folder")
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES)
    if not files:
        raise ValueError(f"data.path={section.path} holds no {', '.join(SUFFIXES)} file")
    return files


def _key(section: DataConfig, files: list[Path], tokenizer: Any) -> str:
    parts = [
        _FORMAT,
        [file_sha256(file) for file in files],
        tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items()),
        tokenizer.eos_token_id,
        [section.text_field, list(section.group_by), section.block_size, section.val_fraction],
    ]
    return f"{section.label}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]}"


def _tokenise(section: DataConfig, files: list[Path], tokenizer: Any, folder: Path) -> None:
    train, validation = [], []
    for file in files:
        if file.suffix == ".jsonl":
            documents = list(_json_documents(file, section))
            every = max(2, round(1 / section.val_fraction))
            validation += [text for index, text in enumerate(documents) if index % every == every // 2]
            train += [text for index, text in enumerate(documents) if index % every != every // 2]
        else:
            text = _read(file)
            cut = _line_start(text, len(text) - int(len(text) * section.val_fraction))
            train.append(text[:cut])
            validation.append(text[cut:])
    splits = {
        "train": _blocks(train, "training", section, tokenizer),
        "validation": _blocks(validation, "validation", section, tokenizer),
    }
    datasets.DatasetDict(splits).save_to_disk(str(folder))


def _blocks(texts: list[str], split: str, section: DataConfig, tokenizer: Any) -> Dataset:
    encoded = tokenizer([text for text in texts if text.strip()] or [""], add_special_tokens=False)["input_ids"]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    tokens = list(itertools.chain.from_iterable(ids + end for ids in encoded if ids))
    size = section.block_size
    if len(tokens) < size:
        raise ValueError(
            f"The {split} text of data={section.label} ({section.path or 'packaged'}) has {len(tokens)} tokens, "
            f"fewer than one block of {size}: give more text, or lower data.block_size"
        )
    rows = [tokens[start : start + size] for start in range(0, len(tokens) - size + 1, size)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return Dataset.from_dict({"input_ids": rows}, features=features)


def _json_documents(file: Path, section: DataConfig) -> Iterator[str]:
    """The ``text_field`` of each line, or, with ``group_by``, of neighbouring lines that share those fields."""
    records = list(_json_records(file, section))
    if not section.group_by:
        yield from (record[section.text_field] for record in records)
        return
    for title, group in itertools.groupby(records, key=lambda r: " ".join(str(r[name]) for name in section.group_by)):
        yield "\n".join([title, *(record[section.text_field] for record in group)])


def _json_records(file: Path, section: DataConfig) -> Iterable[dict[str, Any]]:
    wanted = [section.text_field, *section.group_by]
    for number, line in enumerate(_read(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is not JSON ({error}): mend or remove it") from None
        absent = [name for name in wanted if not isinstance(record, dict) or name not in record]
        if absent:
            raise ValueError(f"{file}, line {number} lacks {', '.join(absent)}: set data.text_field or data.group_by")
        yield record


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None


def _line_start(text: str, position: int) -> int:
    """The start of the line that holds ``position``, so that the cut is between lines where there are any."""
    start = text.rfind("\n", 0, position) + 1
    return start if start > position // 2 else position
