"""Text: how it is split, cut and cached, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from lora_exp.data.kinds.text import Text
from lora_exp.data.text import load_blocks


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def section(path: Path, tmp_path: Path, **changes: Any) -> Text:
    return Text(label="t", path=str(path), block_size=8, cache_dir=str(tmp_path / "cache"), **changes)


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
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "line 2: not JSON"),
        ("other.jsonl", b'{"body": "a"}', r"line 1: lacks text \(it has body\): set data\.text_field=body"),
        ("two.jsonl", b'{"texts": "a", "id": "b"}', r"lacks text \(it has texts, id\): set data\.text_field=texts"),
        ("null.jsonl", b'{"text": "a"}\n\n{"text": null}', "line 3: text is null, and must be text"),
        ("number.jsonl", b'{"text": 3.5, "body": "b"}', "text is the number 3.5, .*what holds it .body"),
        ("list.jsonl", b'{"text": ["a"]}', "text is the list .*, and must be text"),
        ("nested.jsonl", b'{"text": {"a": "b"}}', "text is the object .*, and must be text"),
        ("true.jsonl", b'{"text": true}', "text is true, and must be text"),
        ("half.jsonl", rb'{"text": "\ud800"}', "line 1: text holds half of a surrogate pair"),
        ("array.jsonl", b'[{"text": "a"}]', "line 1: the list .*, and must be an object"),
        ("word.jsonl", b'"text"', "line 1: the text .*, and must be an object"),
        ("deep.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("blank.jsonl", b'{"text": ""}\n{"text": "  "}', "2 of 2 records cannot be used .*\n.*line 1: text is empty"),
        ("one.jsonl", b'{"text": "' + b"word " * 99 + b'"}', "a single document"),
        ("utf16.txt", "words and words".encode("utf-16"), "is UTF-16, not UTF-8: convert it .iconv"),
        ("utf16.jsonl", '{"text": "a"}'.encode("utf-16"), "is UTF-16, not UTF-8"),
        ("data.xlsx", b"PK", r"none of the kinds that are read \(.txt, .md, .jsonl, .json, .csv, .tsv, .parquet\)"),
        ("corpus", b"words", "if corpus is plain text, rename it to corpus.txt"),
        ("notes.pdf", b"words", "if notes.pdf is plain text"),
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
    (tmp_path / "none/notes.pdf").write_text("words")
    with pytest.raises(ValueError, match=r"but 1 others: if notes.pdf is plain text, rename it to notes.txt"):
        load_blocks(section(tmp_path / "none", tmp_path), tokenizer)


@pytest.mark.parametrize("value", ["null", "[1]", '{"a": 1}'])
def test_a_field_to_group_by_must_be_text_or_a_number(tokenizer: Any, tmp_path: Path, value: str) -> None:
    file = tmp_path / "verses.jsonl"
    file.write_text(f'{{"text": "a", "book": 1}}\n{{"text": "a", "book": {value}}}')
    with pytest.raises(ValueError, match=r"1 of 2 records .*\n.*line 2: book is .*, and lines are grouped by text"):
        load_blocks(section(file, tmp_path, group_by=["book"]), tokenizer)
    with pytest.raises(ValueError, match=r"line 1: lacks bok \(it has text, book\): set data.group_by=\[book\]"):
        load_blocks(section(file, tmp_path, group_by=["bok"]), tokenizer)


def decoded(tokenizer: Any, rows: Any) -> str:
    return tokenizer.decode([token for row in rows for token in row["input_ids"].tolist()])


def test_a_byte_order_mark_is_not_text(tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"word{index} " * 20}) for index in range(4)]
    (tmp_path / "bom.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")
    (tmp_path / "bom.txt").write_text("words and words " * 40, encoding="utf-8-sig")
    assert "word0" in decoded(tokenizer, load_blocks(section(tmp_path / "bom.jsonl", tmp_path), tokenizer).train)
    blocks = load_blocks(section(tmp_path / "bom.txt", tmp_path, val_fraction=0.3), tokenizer)
    assert decoded(tokenizer, blocks.train).startswith("words")


def test_the_same_bytes_are_another_text_under_another_suffix(tokenizer: Any, tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": f"word{index} " * 20}) for index in range(40))
    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text(lines)
    raw, read = (load_blocks(section(tmp_path / name, tmp_path), tokenizer) for name in ("a.txt", "a.jsonl"))
    assert '{"text' in decoded(tokenizer, raw.train)
    assert '{"text' not in decoded(tokenizer, read.train)


@pytest.mark.parametrize("documents", [2, 3, 5, 19])
@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.5, 0.75, 0.95])
def test_few_documents_are_split_as_asked(tokenizer: Any, tmp_path: Path, documents: int, fraction: float) -> None:
    file = tmp_path / "few.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"word{index} " * 20}) for index in range(documents)))
    blocks = load_blocks(section(file, tmp_path, val_fraction=fraction), tokenizer)
    texts = [decoded(tokenizer, side) for side in (blocks.train, blocks.validation)]
    seen = [{index for index in range(documents) if f"word{index} " in text} for text in texts]
    assert seen[0] | seen[1] == set(range(documents))
    assert not seen[0] & seen[1]
    assert abs(len(seen[1]) - min(max(documents * fraction, 1), documents - 1)) <= 0.5


def test_documents_of_many_small_files_are_split_together(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for index in range(10):
        (folder / f"{index}.jsonl").write_text(json.dumps({"text": f"word{index} " * 20}))
    blocks = load_blocks(section(folder, tmp_path, val_fraction=0.2), tokenizer)
    held = decoded(tokenizer, blocks.validation)
    assert [index for index in range(10) if f"word{index} " in held] == [2, 7]


def test_a_document_and_a_text_file_need_no_second_document(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "one.jsonl").write_text(json.dumps({"text": "document " * 20}))
    (folder / "two.txt").write_text("words and words " * 40)
    blocks = load_blocks(section(folder, tmp_path, val_fraction=0.4), tokenizer)
    assert "document" in decoded(tokenizer, blocks.train)
    assert "document" not in decoded(tokenizer, blocks.validation)


def test_broken_documents_take_no_ones_place(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "gaps.jsonl"
    texts = ["", "", "word0 " * 20, "", "word1 " * 20, "  "]
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    blocks = load_blocks(section(file, tmp_path, val_fraction=0.5, max_bad_fraction=0.7), tokenizer)
    assert blocks.said[0].startswith("4 of 6 records cannot be used and are passed over:")
    assert "word0" in decoded(tokenizer, blocks.train) or "word0" in decoded(tokenizer, blocks.validation)
    assert len(blocks.train)
    assert len(blocks.validation)


def test_files_of_a_folder_that_are_not_read_are_said(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    (folder / "a.TXT").write_text("words and words " * 40)
    (folder / "notes.pdf").write_text("a,b")
    (folder / ".hidden").write_text("x")
    for _ in range(2):  # also where the blocks are in the cache already
        blocks = load_blocks(section(folder, tmp_path, val_fraction=0.4), tokenizer)
        assert blocks.said == [f"1 files in {folder} are not read: notes.pdf"]


@pytest.mark.parametrize("label", ["../../../x", "/x", ".."])
def test_a_label_writes_nothing_outside_of_the_cache(tokenizer: Any, tmp_path: Path, label: str) -> None:
    wanted = section(numbered(tmp_path), tmp_path)
    wanted.label = label
    load_blocks(wanted, tokenizer)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "numbers.txt"]
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["datasets"]


def test_damaged_blocks_are_made_anew(tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    wanted = section(numbered(tmp_path), tmp_path)
    whole = load_blocks(wanted, tokenizer).train[0]["input_ids"].tolist()
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.suffix != ".lock"]
    for file in files:
        file.write_bytes(bytes(file.stat().st_size))
        caplog.clear()
        assert load_blocks(wanted, tokenizer).train[0]["input_ids"].tolist() == whole
        assert "is damaged" in caplog.text
