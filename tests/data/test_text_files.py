"""Text files are cut and read in pieces as they would be whole."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora_exp.data.broken import BadRecords
from lora_exp.data.kinds.text import Text
from lora_exp.data.split import cut
from lora_exp.data.text import load_blocks
from lora_exp.data.text_files import divided, length_of, pieces, repeated

CHARACTERS = st.text(st.sampled_from("ab \n\tü日😀"), min_size=1, max_size=300)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_exp.data.text_files.PIECE", 7)


@settings(max_examples=200, deadline=None)
@given(text=CHARACTERS, validation=st.floats(0.01, 0.6), test=st.sampled_from([0.0, 0.2, 0.39]))
def test_a_file_is_cut_where_the_whole_text_is(
    tmp_path_factory: pytest.TempPathFactory, text: str, validation: float, test: float
) -> None:
    file = tmp_path_factory.getbasetemp() / "cut.txt"
    file.write_text(text, encoding="utf-8", newline="")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_exp.data.text_files.PIECE", 7)
        length = length_of(file, BadRecords())
        parts = divided(file, length, validation, test)
        read = {split: "".join(stretch.pieces()) for split, stretch in parts.items()}
    assert length == len(text)
    assert "".join(read.values()) == text
    assert len(read["train"]) == cut(text, validation + test)
    assert len(read["test"]) == (len(text) - cut(text, test) if test else len(read["test"]))


@pytest.mark.parametrize("line", [905, 940, 985, 991, 1015, 1060, 1095])
def test_a_cut_moves_to_a_line_that_is_as_far_off_as_may_be(tmp_path: Path, line: int) -> None:
    text = "x" * line + "\n" + "y" * (2000 - line - 1)
    (tmp_path / "a.txt").write_text(text)
    parts = divided(tmp_path / "a.txt", len(text), 0.5, 0.0)
    assert parts["validation"].start == cut(text, 0.5) == line + 1


def test_line_ends_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (train, *_) = divided(file, length_of(file, BadRecords()), 0.0, 0.0).values()
    assert "".join(train.pieces()) == "one\ntwo\nthree\n"


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("weight", [0.25, 1, 2.5])
def test_a_text_occurs_as_often_as_its_weight_says(tmp_path: Path, weight: float) -> None:
    file = tmp_path / "a.txt"
    file.write_text("0123456789" * 20)
    whole = divided(file, 200, 0.0, 0.0)["train"]
    found = ["".join(stretch.pieces()) for stretch in repeated(whole, weight, "seed")]
    assert sum(map(len, found)) == 200 * weight
    assert all(text == file.read_text() for text in found[: int(weight)])
    assert all(text in file.read_text() for text in found)


@given(parts=st.lists(st.text(st.sampled_from("a \n"), max_size=40), max_size=9))
def test_pieces_are_the_text_again(parts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_exp.data.text_files.PIECE", 10)
        found = list(pieces(iter(parts)))
    assert "".join(found) == "".join(parts)
    assert all(0 < len(piece) <= 10 for piece in found)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_tokens_of_pieces_are_those_of_the_whole_text(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    """The tokenizer splits text into words first, as those of GPT-2, Llama 3, Qwen and SmolLM2 do."""
    import json

    draw, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(tiny_llama)
    lines = [" ".join(draw.choices(["king", "people", "sea,", "said:", "x"], k=9)) for _ in range(120)]
    texts = ["\n".join(lines[start : start + 40]) for start in range(0, 120, 40)]
    file = tmp_path / f"a{suffix}"
    file.write_text("\n".join(texts) if suffix == ".txt" else "\n".join(json.dumps({"text": text}) for text in texts))

    def tokens(folder: str) -> Any:
        wanted = Text(label="t", path=str(file), block_size=8, val_fraction=0.3, cache_dir=str(tmp_path / folder))
        blocks = load_blocks(wanted, tokenizer)
        return blocks.train["input_ids"][:].tolist(), blocks.validation["input_ids"][:].tolist()

    whole = tokens("whole")
    monkeypatch.setattr("lora_exp.data.text_files.PIECE", 200)
    monkeypatch.setattr("lora_exp.data.text._BATCH", 500)
    assert tokens("pieces") == whole
