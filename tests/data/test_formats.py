"""Files of every format give the records that pandas and json read, and what is broken comes with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_exp.data.broken import Broken
from lora_exp.data.formats import read_file
from lora_exp.data.json_list import list_items

TABLE = [
    {"text": "plain", "n": 1},
    {"text": 'quotes "and", commas', "n": 2},
    {"text": "two\nlines", "n": 3},
    {"text": "ümläut 日本 😀", "n": 4},
]


def write(file: Path, table: list[dict[str, object]]) -> Path:
    frame = pandas.DataFrame(table)
    if file.suffix == ".jsonl":
        file.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in table) + "\n")
    elif file.suffix == ".json":
        file.write_text(json.dumps(table, ensure_ascii=False, indent=2))
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if file.suffix == ".tsv" else ",")
    return file


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_each_format_holds_the_same_records(tmp_path: Path, suffix: str) -> None:
    found = [record for _, record in read_file(write(tmp_path / f"a{suffix}", TABLE))]
    is_table = suffix in (".csv", ".tsv")  # which know text alone
    assert found == [{**row, "n": str(row["n"]) if is_table else row["n"]} for row in TABLE]


@pytest.mark.parametrize(
    ("name", "content", "places", "reasons"),
    [
        ("a.jsonl", b'{"t": 1}\n\n{"t": \n{"t": "\xff"}\nnull\r\n{"t": 2}', [3, 4, 5], ["JSON", "UTF-8", "null, and"]),
        ("a.jsonl", b'\xef\xbb\xbf{"t": 1}\r{"t": 2}\r[1]', [3], ["the list"]),
        ("a.csv", b"t,u\n1,2\n1\n1,2,3\n\n\xff,2\n3,4", [3, 4, 6], ["1 columns", "3 columns", "not UTF-8"]),
        ("a.csv", b'\xef\xbb\xbft,u\n"a\nb",2\n3\n"half a li', [4, 5], ["1 columns", "no row of a table"]),
        ("a.tsv", b"t\tu\n1\t2\n1\n", [3], ["1 columns"]),
        ("a.json", b'[{"t": 1}, 3, {"t": 2}]', [2], ["the number 3"]),
        ("a.json", b' {"v": [1], "data": [{"t": 1}, null]}', [2], ["null, and"]),
    ],
)
def test_what_is_broken_comes_with_its_place(
    tmp_path: Path, name: str, content: bytes, places: list[int], reasons: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    read = list(read_file(tmp_path / name))
    broken = [(where, record.reason) for where, record in read if isinstance(record, Broken)]
    assert [int(where.rsplit(" ", 1)[1]) for where, _ in broken] == places
    for (_, reason), expected in zip(broken, reasons, strict=True):
        assert expected in reason
    assert [record for _, record in read if not isinstance(record, Broken)]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.json", b'[{"t": 1},\n {"t": ', "line 2: not JSON"),
        ("a.json", b'[{"t": 1}', "line 1: cut off"),
        ("a.json", b'[{"t": 1}\n{"t": 2}]', "line 2: '{' where , or ] is due"),
        ("a.json", b'{"rows": [1]}', 'an object with rows and without a list "data"'),
        ("a.json", b'"text"', "neither a list nor"),
        ("a.json", b"", "neither a list nor"),
        ("a.json", b'[{"t": "\xff"}]', "not UTF-8 text"),
        ("a.csv", b"t,t\n1,2\n", "names a column twice"),
        ("a.parquet", b"PAR1 and no more", "cannot be read as Parquet after row 0"),
        ("a.jsonl", '{"t": 1}'.encode("utf-16"), "is UTF-16, not UTF-8"),
    ],
)
def test_a_file_of_which_nothing_more_can_be_read_is_refused(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says.replace("[", r"\[")):
        list(read_file(tmp_path / name))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=9),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(VALUES, max_size=8), piece=st.integers(1, 9), indent=st.sampled_from([None, 1]))
def test_a_list_is_read_in_pieces_of_any_size(
    tmp_path_factory: pytest.TempPathFactory, values: list[object], piece: int, indent: int | None
) -> None:
    file = tmp_path_factory.getbasetemp() / "pieces.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lora_exp.data.json_list._PIECE", piece)
        for whole in (values, {"x": {"data": 3}, "data": values, "y": 1}):
            file.write_text(json.dumps(whole, indent=indent))
            assert list(list_items(file)) == values
