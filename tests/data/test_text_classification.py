"""Texts and their classes: what is read, refused, split, tokenised and batched."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, DataCollatorWithPadding, PreTrainedTokenizerBase

from lora_exp.config import PackagedConfig
from lora_exp.data import Data, load_data
from lora_exp.data.kinds.text_classification import TextClassification
from lora_exp.errors import UserError

WORDS = {"calm": "the sea rested", "loud": "the ox sang", "odd": "lambs build mountains"}


@pytest.fixture
def tokenizer(tiny_llama: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_llama)


def records(count: int = 30) -> list[dict[str, Any]]:
    names = list(WORDS)
    return [
        {"text": f"{WORDS[names[i % 3]]} {i} times" + " again" * (i % 7), "label": names[i % 3]} for i in range(count)
    ]


def jsonl(file: Path, rows: list[Any]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def folders(root: Path, rows: list[dict[str, Any]]) -> Path:
    for index, row in enumerate(rows):
        (root / row["label"]).mkdir(parents=True, exist_ok=True)
        (root / row["label"] / f"{index:03}.txt").write_text(row["text"])
    return root


def loaded(tokenizer: PreTrainedTokenizerBase, path: Path | None = None, **fields: Any) -> Data:
    values: dict[str, Any] = {"label": "own", "val_fraction": 0.2, **fields}
    return load_data(TextClassification(path=str(path) if path else None, **values), lambda: tokenizer)


def test_files_of_every_sort_and_folders_give_the_same_texts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = sorted(records(), key=lambda row: row["label"])
    with (tmp_path / "a.csv").open("w", newline="") as stream:
        writer = csv.DictWriter(stream, ["text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows))
    sources = [
        jsonl(tmp_path / "a.jsonl", rows),
        tmp_path / "a.csv",
        tmp_path / "a.json",
        folders(tmp_path / "a", rows),
    ]
    found = [loaded(tokenizer, source) for source in sources]
    for data in found:
        assert data.shape["class_names"] == ("calm", "loud", "odd")
        assert (len(data.train), len(data.validation)) == (24, 6)  # type: ignore[arg-type]
        assert data.test is None
        counts = torch.bincount(torch.tensor(data.validation.labels))  # type: ignore[attr-defined]
        assert counts.tolist() == [2, 2, 2]
        for split in ("train", "validation"):
            ours, first = getattr(data, split), getattr(found[0], split)
            assert sorted(tuple(row["input_ids"].tolist()) for row in ours) == sorted(
                tuple(row["input_ids"].tolist()) for row in first
            )
    assert found[0].fingerprint != found[3].fingerprint
    assert loaded(tokenizer, sources[0]).fingerprint == found[0].fingerprint


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({"text": "no label"}, "it lacks label (it has text)"),
        ({"label": "calm"}, "it lacks text (it has label)"),
        ({"text": None, "label": "calm"}, "text is null, and must be text"),
        ({"text": 3, "label": "calm"}, "text is the number 3, and must be text"),
        ({"text": "  ", "label": "calm"}, "text is empty"),
        ({"text": "x", "label": None}, "label is null, and must be a name or a whole number"),
        ({"text": "x", "label": ["calm"]}, 'label is the list ["calm"]'),
        ({"text": "x", "label": 0.5}, "label is the number 0.5"),
        ({"text": "x", "label": ""}, "must be a name"),
        ('{"text": "half', "not JSON"),
    ],
)
def test_a_broken_record_is_named_and_can_be_passed_over(
    broken: Any, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    file = jsonl(tmp_path / "a.jsonl", [*records(20), broken, *records(40)[20:]])
    with pytest.raises(UserError) as raised:
        loaded(tokenizer, file)
    assert f"{file}, line 21" in str(raised.value)
    assert says in str(raised.value)
    assert "1 of 41" in str(raised.value)
    data = loaded(tokenizer, file, max_bad_fraction=0.05)
    assert len(data.train) + len(data.validation) == 40  # type: ignore[arg-type]
    assert any("1 of 41 records cannot be used" in line and says in line for line in data.said)


def test_a_file_of_a_class_that_is_not_utf8_is_a_broken_record(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    root = folders(tmp_path / "a", records())
    (root / "calm" / "x.txt").write_bytes("a £ sign".encode("latin-1"))
    with pytest.raises(UserError, match=r"calm/x\.txt: it is not UTF-8 text.*byte 2"):
        loaded(tokenizer, root)
    assert "1 of 31" in loaded(tokenizer, root, max_bad_fraction=0.1).said[0]


def test_numbers_are_classes_in_their_own_order(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"number {i} " + "of it" * i, "label": i % 11} for i in range(44)]
    data = loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows))
    assert data.shape["class_names"] == tuple(map(str, range(11)))
    assert [row["labels"].item() for row in data.train][:3] == [row["label"] for row in rows if row is not rows[2]][:3]  # type: ignore[attr-defined]


def test_one_class_is_refused(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [{"text": f"text {i}", "label": "calm"} for i in range(9)]
    with pytest.raises(UserError, match=r"texts of 1 classes \(calm\).*data\.label_field"):
        loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows))


def test_splits_of_their_own_and_a_class_that_is_not_trained_on(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    train = jsonl(tmp_path / "a.jsonl", records(20))
    held_out = [{"text": "another sort", "label": "new"}, *records(12)[10:]]
    validation = jsonl(tmp_path / "b.jsonl", held_out)
    test = folders(tmp_path / "c", records(30)[24:])
    data = loaded(tokenizer, train, validation_path=str(validation), test_path=str(test))
    assert data.shape["class_names"] == ("calm", "loud", "new", "odd")
    assert (len(data.train), len(data.validation), len(data.test)) == (18, 3, 6)  # type: ignore[arg-type]
    assert any("no text of new is trained on" in line for line in data.said)
    assert any("2 records to train on equal held-out ones" in line for line in data.said)


@pytest.mark.parametrize("longest", [4, 9, 400])
def test_what_is_cut_is_counted_and_is_the_tokenizers_own_cut(
    longest: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = records()
    data = loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows), max_length=longest)
    whole = tokenizer([row["text"] for row in rows])["input_ids"]
    cut = sum(len(ids) > longest for ids in whole)
    assert sum(int(line.split()[0]) for line in data.said if "are cut to" in line) == cut
    expected = tokenizer([row["text"] for row in rows], truncation=True, max_length=longest)["input_ids"]
    found = [row["input_ids"].tolist() for split in (data.train, data.validation) for row in split]  # type: ignore[attr-defined]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("longest", [9, 400])
def test_a_suffix_ends_every_text_also_one_that_was_cut(
    longest: int, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows, suffix = records(), "\nTopic:"
    data = loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows), max_length=longest, suffix=suffix)
    ending = tokenizer(suffix, add_special_tokens=False)["input_ids"]
    cut = tokenizer([row["text"] for row in rows], truncation=True, max_length=longest - len(ending))["input_ids"]
    found = [row["input_ids"].tolist() for split in (data.train, data.validation) for row in split]  # type: ignore[attr-defined]
    assert sorted(found) == sorted([*ids, *ending] for ids in cut)
    assert max(map(len, found)) <= longest


def test_a_suffix_comes_before_the_special_tokens_of_the_end(tmp_path: Path) -> None:
    tokenizer = _bert_tokenizer()
    rows = [{"one": f"sea {i}", "two": "ox lamb", "label": i % 2} for i in range(8)]
    options = {"text_field": "one", "pair_field": "two", "suffix": "sea 7"}
    row = loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows), **options).train[0]
    expected = tokenizer("sea 0", "ox lamb sea 7")
    assert row["input_ids"].tolist() == expected["input_ids"]
    assert row["token_type_ids"].tolist() == expected["token_type_ids"]
    rows[0]["two"] = "ox unheard-of"  # the token of an unknown word is special as well
    row = loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows), **options).train[0]
    assert row["input_ids"].tolist() == tokenizer("sea 0", "ox unheard-of sea 7")["input_ids"]
    with pytest.raises(UserError, match=r"max_length=5 leaves no room beside 3 special tokens and 2 of data\.suffix"):
        loaded(tokenizer, jsonl(tmp_path / "a.jsonl", rows), **options, max_length=5)


def test_a_batch_is_transformers_own(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    section = TextClassification(label="own", path=str(jsonl(tmp_path / "a.jsonl", records())))
    data = load_data(section, lambda: tokenizer)
    rows = [data.train[index] for index in (0, 5, 9, 3)]
    batch = section.collate(rows)
    plain = [{"input_ids": row["input_ids"].tolist(), "labels": row["labels"].item()} for row in rows]
    expected = DataCollatorWithPadding(tokenizer)(plain)
    assert set(batch) == set(expected)
    for name, values in expected.items():
        assert torch.equal(batch[name], values), name
    assert batch["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)


def test_two_texts_are_one_row(tmp_path: Path) -> None:
    tokenizer = _bert_tokenizer()
    rows = [{"one": f"sea {i}", "two": "ox lamb", "label": i % 2} for i in range(8)]
    file = jsonl(tmp_path / "a.jsonl", rows)
    data = loaded(tokenizer, file, text_field="one", pair_field="two")
    row = data.train[0]
    expected = tokenizer("sea 0", "ox lamb")
    assert row["input_ids"].tolist() == expected["input_ids"]
    assert row["token_type_ids"].tolist() == expected["token_type_ids"]
    batch = TextClassification(label="own").collate([row, data.train[1]])
    assert {"input_ids", "token_type_ids", "attention_mask", "labels"} == set(batch)
    with pytest.raises(UserError, match=r"data\.max_length=3 leaves no room beside 3 special tokens"):
        loaded(tokenizer, file, text_field="one", pair_field="two", max_length=3)


def _bert_tokenizer() -> PreTrainedTokenizerBase:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sea", "ox", "lamb", *map(str, range(10))]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)})


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"max_length": 2}, "data.max_length=2 is below 3"),
        ({"pair_field": "text"}, "data.pair_field=text is data.text_field as well"),
        ({"label_field": "text"}, "data.label_field=text is a text's field as well"),
        ({"path": "/nowhere"}, "data.path=/nowhere does not exist"),
    ],
)
def test_what_can_be_seen_before_anything_is_loaded(fields: dict[str, Any], says: str) -> None:
    assert any(says in problem for problem in TextClassification(label="own", **fields).problems("train"))


def test_folders_of_classes_need_no_suffix(tmp_path: Path) -> None:
    assert TextClassification(label="own", path=str(folders(tmp_path / "a", records()))).problems("train") == []


def test_bbc_news_is_what_its_page_says(workplace: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from omegaconf import OmegaConf

    from lora_exp.config import conf_folder
    from lora_exp.machine.packaged import find_packaged

    fields: Any = OmegaConf.to_container(OmegaConf.load(conf_folder() / "data/bbc_news.yaml"))
    packaged = PackagedConfig(**fields.pop("packaged"))
    if find_packaged(packaged) is None:
        pytest.skip("the extra 'classification' is not installed")
    del fields["kind"]
    data = load_data(TextClassification(packaged=packaged, **fields), lambda: tokenizer)
    assert data.shape["class_names"] == ("business", "entertainment", "politics", "sports", "tech")
    assert len(data.train) + len(data.validation) > 2_190  # type: ignore[arg-type]
    assert any("1 of 2,225 records cannot be used" in line and "199.txt" in line for line in data.said)
