"""Text: how it is split, cut and cached, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_exp.config import DataConfig
from lora_exp.data.text import load_blocks


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def section(path: Path, tmp_path: Path, **changes: Any) -> DataConfig:
    return DataConfig(label="t", path=str(path), block_size=8, cache_dir=str(tmp_path / "cache"), **changes)


def numbered(tmp_path: Path, count: int = 400) -> Path:
    file = tmp_path / "numbers.txt"
    file.write_text("\n".join(f"line {index} of the book" for index in range(count)))
    return file


def test_the_splits_share_nothing_and_lose_only_the_last_partial_block(tokenizer: Any, tmp_path: Path) -> None:
    file = numbered(tmp_path)
    blocks = load_blocks(section(file, tmp_path, val_fraction=0.1), tokenizer)
    train = [token for row in blocks.train for token in row["input_ids"].tolist()]
    validation = [token for row in blocks.validation for token in row["input_ids"].tolist()]
    text = file.read_text()
    read = tokenizer.decode(train, skip_special_tokens=True)
    assert text.startswith(read)
    assert tokenizer.decode(validation, skip_special_tokens=True) in text[len(read) :]
    assert len(validation) / (len(train) + len(validation)) == pytest.approx(0.1, abs=0.02)


def test_json_lines_are_grouped_and_every_kth_document_is_held_out(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "verses.jsonl"
    verses = [{"book": "B", "chapter": c, "text": f"word{c} " * 12} for c in range(20) for _ in range(2)]
    file.write_text("\n".join(json.dumps(verse) for verse in verses))
    wanted = section(file, tmp_path, group_by=["book", "chapter"], val_fraction=0.25)
    blocks = load_blocks(wanted, tokenizer)
    held = {c for c in range(20) if c % 4 == 2}
    seen = {split: tokenizer.decode([t for row in getattr(blocks, split) for t in row["input_ids"].tolist()])
            for split in ("train", "validation")}  # fmt: skip
    for chapter in range(20):
        inside, outside = ("validation", "train") if chapter in held else ("train", "validation")
        assert f"word{chapter} " in seen[inside]
        assert f"word{chapter} " not in seen[outside]


def test_text_is_tokenised_once_and_again_when_it_changes(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = numbered(tmp_path)
    first = load_blocks(section(file, tmp_path), tokenizer)
    calls = []
    monkeypatch.setattr("lora_exp.data.text._tokenise", lambda *_: calls.append(1) or pytest.fail("tokenised again"))
    again = load_blocks(section(file, tmp_path), tokenizer)
    assert first.train[0]["input_ids"].tolist() == again.train[0]["input_ids"].tolist()
    file.write_text(file.read_text() + " and more")
    with pytest.raises(pytest.fail.Exception):
        load_blocks(section(file, tmp_path), tokenizer)


def test_a_folder_is_read_file_by_file(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deep").mkdir(parents=True)
    for name in ("a.txt", "deep/b.md"):
        (folder / name).write_text("\n".join(f"{name} line {index}" for index in range(100)))
    (folder / "ignored.bin").write_bytes(b"\xff\xfe")
    blocks = load_blocks(section(folder, tmp_path), tokenizer)
    text = tokenizer.decode([t for row in blocks.validation for t in row["input_ids"].tolist()])
    assert "a.txt line 99" in text
    assert "deep/b.md line 9" in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", b"", "0 tokens"),
        ("short.txt", b"two words", "fewer than one block of 8"),
        ("latin.txt", "caf\u00e9 ".encode("latin-1") * 50, "not UTF-8"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}', r"lacks text: set data\.text_field"),
    ],
)
def test_bad_text_is_refused_with_the_reason(
    tokenizer: Any, tmp_path: Path, name: str, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        load_blocks(section(tmp_path / name, tmp_path), tokenizer)
    assert not list((tmp_path / "cache").rglob("dataset_dict.json"))


def test_a_folder_without_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match=r"holds no \.txt"):
        load_blocks(section(tmp_path / "none", tmp_path), tokenizer)
