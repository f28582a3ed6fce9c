"""Sources: what each split gets, how often, and what becomes of broken records."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lora_exp.data.kinds.text import Text
from lora_exp.data.sources import BadRecords, fingerprint, records
from lora_exp.data.split import SPLITS, shares
from lora_exp.errors import UserError


def write(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def section(path: object, **changes: Any) -> Text:
    return Text(label="t", path=path, **changes)


def texts(wanted: Text, split: str, bad: BadRecords | None = None) -> list[str]:
    return [str(record["text"]) for _, record in records(wanted, split, bad or BadRecords(wanted.max_bad_fraction))]


def words(count: int, prefix: str = "w") -> list[str]:
    return [f"{prefix}{index}" for index in range(count)]


def test_fractions_divide_all_records_and_none_is_in_two_splits(tmp_path: Path) -> None:
    wanted = section(str(write(tmp_path / "a.jsonl", words(100))), val_fraction=0.2, test_fraction=0.1)
    found = {split: texts(wanted, split) for split in SPLITS}
    assert [len(found[split]) for split in SPLITS] == [70, 20, 10]
    assert sorted(text for each in found.values() for text in each) == sorted(words(100))
    alone = section(wanted.path, val_fraction=0.2)
    assert texts(alone, "validation") == found["validation"], "the test split moved the validation split"
    assert texts(alone, "test") == []


def test_paths_of_their_own_leave_the_training_records_whole(tmp_path: Path) -> None:
    names = {"path": "a", "validation_path": "b", "test_path": "c"}
    paths = {key: str(write(tmp_path / f"{name}.jsonl", words(9, name))) for key, name in names.items()}
    wanted = section(paths.pop("path"), **paths)
    for split, prefix in zip(SPLITS, "abc", strict=True):
        assert texts(wanted, split) == words(9, prefix)


def test_a_held_out_file_in_the_folder_is_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", words(9, "a"))
    write(tmp_path / "valid.jsonl", words(9, "b"))
    wanted = section(str(tmp_path), validation_path=str(tmp_path / "valid.jsonl"))
    assert texts(wanted, "train") == words(9, "a")
    with pytest.raises(ValueError, match="no file that is not held out"):
        texts(section(str(tmp_path / "valid.jsonl"), validation_path=str(tmp_path / "valid.jsonl")), "train")


def test_twins_of_held_out_records_are_not_trained_on_and_this_is_said(tmp_path: Path) -> None:
    file = str(write(tmp_path / "a.jsonl", [*words(20), *reversed(words(20))]))
    wanted = section(file, val_fraction=0.2, test_fraction=0.1)
    found, bad = {}, BadRecords()
    for split in SPLITS:
        found[split] = set(texts(wanted, split, bad))
    assert not found["train"] & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]
    assert set.union(*found.values()) == set(words(20))
    assert "equal held-out ones and are left out" in bad.said()[0]
    held = str(write(tmp_path / "b.jsonl", ["w3", "new"]))
    apart = section(file, validation_path=held)
    assert "w3" not in texts(apart, "train")
    assert texts(apart, "validation") == ["w3", "new"]


@pytest.mark.parametrize("weight", [0.3, 0.5, 1, 1.25, 2, 3.7])
def test_a_record_occurs_as_often_as_its_weight_says(tmp_path: Path, weight: float) -> None:
    one, other = write(tmp_path / "a.jsonl", words(50, "a")), write(tmp_path / "b.jsonl", words(30, "b"))
    wanted = section({str(one): weight, str(other): 1}, val_fraction=0.2)
    assert len(texts(wanted, "validation")) == len(set(texts(wanted, "validation"))) == 16
    train = texts(wanted, "train")
    counts = Counter(text for text in train if text[0] == "a")
    left = 50 - sum(text[0] == "a" for text in texts(wanted, "validation"))
    assert sum(counts.values()) == round(weight * left)
    assert set(counts.values()) <= {int(weight), int(weight) + 1}
    assert Counter(text for text in train if text[0] == "b").most_common(1)[0][1] == 1
    assert all(first != second for first, second in itertools.pairwise(train)), "a record follows itself"
    assert texts(wanted, "train") == train
    wanted.sample_seed = 1
    assert (texts(wanted, "train") == train) == (weight == int(weight))


def test_the_drawn_part_is_any_of_the_records(tmp_path: Path) -> None:
    """Not, say, every second: 400 draws of a quarter of twelve, each record in about a hundred."""
    file, counts = write(tmp_path / "a.jsonl", words(12)), Counter[str]()
    other = str(write(tmp_path / "b.jsonl", ["b"]))
    for seed in range(400):
        counts.update(texts(section({str(file): 0.25}, validation_path=other, sample_seed=seed), "train"))
    assert sum(counts.values()) == 1200
    assert all(65 < count < 135 for count in counts.values()), counts


def test_broken_records_are_counted_once_over_all_splits_and_passes(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", words(20))
    file.write_text('{"text": \n' + file.read_text() + "null\n[]\n3\n")
    wanted = section({str(file): 2.5}, val_fraction=0.2, test_fraction=0.2, max_bad_fraction=0.2)
    bad = BadRecords(wanted.max_bad_fraction)
    for split in SPLITS:
        texts(wanted, split, bad)
    assert (bad.count, bad.seen) == (4, 24)
    (said,) = bad.said()
    assert said.splitlines()[0] == "4 of 24 records cannot be used and are passed over:"
    assert [line.split(": ")[0].rsplit(", ")[1] for line in said.splitlines()[1:]] == ["line 1", "line 22", "line 23"]


def test_more_broken_records_than_may_be_end_it_before_the_first_record(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", words(96))
    file.write_text(file.read_text() + "null\n" * 4)
    for most in (0.0, 0.039):
        with pytest.raises(ValueError, match=r"4 of 100 records .*\(4.00%\).*\n.*line 97: null, .*\n.*\n.*\n.* 1 more"):
            next(records(section(str(file), max_bad_fraction=most), "validation", BadRecords(most)))
    assert len(texts(section(str(file), max_bad_fraction=0.04), "train")) == 91


@settings(deadline=None)
@given(count=st.integers(1, 5000), share=st.floats(0.0001, 1))
def test_the_share_that_is_proposed_lets_them_pass(count: int, share: float) -> None:
    bad = BadRecords(count=max(1, round(count * share)))
    with pytest.raises(ValueError, match="max_bad_fraction=") as caught:
        bad.check(count)
    BadRecords(float(str(caught.value).rsplit("=", 1)[1]), count=bad.count).check(count)


def test_a_kinds_own_problem_is_found_before_the_splits_are_made(tmp_path: Path) -> None:
    wanted = section(str(write(tmp_path / "a.jsonl", ["", *words(4)])), max_bad_fraction=0.5, val_fraction=0.25)
    bad = BadRecords(0.5)
    problem = lambda record: None if record["text"] else "text is empty"  # noqa: E731
    found = [record["text"] for _, record in records(wanted, "train", bad, problem)]
    assert len(found) == 3
    assert bad.first == [f"{wanted.path}, line 1: text is empty"]


def test_the_fingerprint_is_of_content_splits_fields_and_weights(tmp_path: Path) -> None:
    file, copy = write(tmp_path / "a.jsonl", words(9)), write(tmp_path / "b.jsonl", words(9))
    other = write(tmp_path / "c.jsonl", words(8))
    first = fingerprint(section(str(file)), 1)
    assert fingerprint(section(str(copy)), 1) == first
    changed = [
        fingerprint(section(str(file)), 2), fingerprint(section(str(other)), 1),
        fingerprint(section({str(file): 2}), 1), fingerprint(section(str(file), val_fraction=0.1), 1),
        fingerprint(section(str(file), text_field="x"), 1), fingerprint(section(str(file), sample_seed=1), 1),
        fingerprint(section(str(file), test_path=str(other)), 1),
        fingerprint(section(str(file), validation_path=str(other)), 1),
    ]  # fmt: skip
    assert len({first, *changed}) == 9
    file.write_text(file.read_text().replace("w3", "x3"))
    assert fingerprint(section(str(file)), 1) != first


@example(count=3, validation=0.6, test=0.25)  # the nearest number of validation rows would leave one for two splits
@given(count=st.integers(3, 2000), validation=st.floats(0.001, 0.6), test=st.floats(0.001, 0.3))
def test_each_split_has_its_fraction_and_at_least_one(count: int, validation: float, test: float) -> None:
    counts = Counter(shares(count, validation, test))
    assert all(counts[split] for split in range(3))
    for split, fraction in ((1, validation), (2, test)):
        assert abs(counts[split] - fraction * count) <= 1


def test_too_few_records_are_refused() -> None:
    with pytest.raises(UserError, match="2 cannot be split into training, validation and test"):
        shares(2, 0.5, 0.2)
    for validation, test in ((0.5, 0.0), (0.0, 0.5)):
        with pytest.raises(UserError, match="1 cannot be split into training and validation"):
            shares(1, validation, test)


@pytest.fixture
def hub(tmp_path: Path) -> Path:
    """A dataset in hub layout, as a local folder: parquet, a split a file."""
    import pandas

    folder = tmp_path / "hub"
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 40), ("validation", 6), ("test", 5)):
        table = pandas.DataFrame({"text": words(count, split[0:2])})
        table.to_parquet(folder / f"data/{split}-00000-of-00001.parquet")
    return folder


def from_hub(hub: Path, **changes: Any) -> Text:
    return Text(label="h", name=str(hub), cache_dir=str(hub.parent / "cache"), **changes)


def test_a_dataset_of_the_hub_has_its_own_splits(hub: Path) -> None:
    own = from_hub(hub, validation_split="validation", test_split="test")
    assert [len(texts(own, split)) for split in SPLITS] == [40, 6, 5]
    assert texts(own, "validation") == words(6, "va")
    shared = from_hub(hub, val_fraction=0.25, split="train[:20]")
    assert [len(texts(shared, split)) for split in SPLITS] == [15, 5, 0]
    where, record = next(records(own, "test", BadRecords()))
    assert (where, record) == (f"{hub} (test), row 1", {"text": "te0"})
    assert fingerprint(own) == fingerprint(from_hub(hub, validation_split="validation", test_split="test"))
    assert fingerprint(own) != fingerprint(from_hub(hub, validation_split="test", test_split="validation"))


@pytest.mark.parametrize("changes", [{"split": "nowhere"}, {"subset": "none"}, {"name": "/no/such/folder"}])
def test_a_dataset_that_cannot_be_had_is_one_clear_error(hub: Path, changes: dict[str, str]) -> None:
    wanted = from_hub(hub)
    for key, value in changes.items():
        setattr(wanted, key, value)
    with pytest.raises(ValueError, match=r"data.name=.* cannot be had .*: mend the name, the split"):
        texts(wanted, "train")
