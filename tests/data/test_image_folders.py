"""Images as files, a folder a class: what is read, turned, cut, refused and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lora_exp.data import Data, load_data
from lora_exp.data.image_files import read_image
from lora_exp.data.kinds.images import Images
from lora_exp.errors import UserError


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folders(root: Path, count: int = 12, mode: str = "L", suffix: str = "png") -> Path:
    for index in range(count):
        folder = root / ("bright", "dark", "striped")[index % 3]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draw(index, 10, 10) if mode == "L" else draw(index, 10, 10, 3)
        Image.fromarray(pixels).save(folder / f"{index:02}.{suffix}")
    return root


def load(path: Path, tmp_path: Path, **changes: Any) -> Data:
    values = {"label": "own", "path": str(path), "image_size": 8, "val_fraction": 0.25}
    section = Images(cache_dir=str(tmp_path / "cache"), **(values | changes))
    return load_data(section, lambda: pytest.fail("images need no tokenizer"))


def rows(data: Data) -> list[tuple[int, list[int]]]:
    every = [row for part in (data.train, data.validation, data.test or ()) for row in part]  # type: ignore[union-attr]
    return sorted((int(row["labels"]), row["pixels"].flatten().tolist()) for row in every)


def test_grey_files_are_what_a_table_of_the_same_pixels_is(tmp_path: Path) -> None:
    root = folders(tmp_path / "a")
    lines = [",".join(map(str, [*draw(index, 10, 10).flatten().tolist(), index % 3])) for index in range(12)]
    (tmp_path / "a.csv").write_text("\n".join(lines))
    files, table = load(root, tmp_path), load(tmp_path / "a.csv", tmp_path)
    assert rows(files) == rows(table)
    assert files.shape == table.shape == {"classes": 3, "image_size": 8}
    assert (len(files.train), len(files.validation)) == (9, 3)  # type: ignore[arg-type]
    assert sorted(int(row["labels"]) for row in files.validation) == [0, 1, 2]  # type: ignore[attr-defined]


def test_colour_stays_and_grey_among_it_is_spread_over_three_channels(tmp_path: Path) -> None:
    root = folders(tmp_path / "a", mode="RGB")
    Image.fromarray(draw(99, 8, 8)).save(root / "dark" / "grey.png")
    data = load(root, tmp_path)
    found = {tuple(row["pixels"].shape) for row in data.train}  # type: ignore[attr-defined]
    assert found == {(3, 8, 8)}
    grey = torch.from_numpy(draw(99, 8, 8)).expand(3, 8, 8).flatten().tolist()
    assert (1, grey) in rows(data)
    batch = Images(label="x").collate([data.train[0], data.train[1]])
    torch.testing.assert_close(batch["pixels"][0], data.train[0]["pixels"] / 255)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.png", b""),
        ("text.jpg", b"this is no image"),
        ("half.png", None),
        ("Thumbs.db", b"\0" * 40),
    ],
)
def test_a_broken_image_is_named_counted_and_passed_over(name: str, content: bytes | None, tmp_path: Path) -> None:
    root = folders(tmp_path / "a")
    if content is None:
        whole = (root / "dark" / "01.png").read_bytes()
        content = whole[: len(whole) // 2]
    (root / "bright" / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"1 of 13 records.*\n.*bright/{name}: it is no image that can be read"):
        load(root, tmp_path)
    data = load(root, tmp_path, max_bad_fraction=0.1)
    assert len(rows(data)) == 12
    assert "1 of 13 records cannot be used" in data.said[0]
    assert load(root, tmp_path, max_bad_fraction=0.1).said == data.said  # from the cache, too
    with pytest.raises(UserError):
        load(root, tmp_path)


def test_hidden_files_are_none_of_it(tmp_path: Path) -> None:
    root = folders(tmp_path / "a")
    (root / "bright" / ".DS_Store").write_bytes(b"x")
    (root / ".git").mkdir()
    (root / ".git" / "x").write_bytes(b"x")
    assert load(root, tmp_path).shape["classes"] == 3


@pytest.mark.parametrize("size", [(10, 20), (20, 10), (9, 9), (3, 3)])
def test_the_middle_square_is_taken(size: tuple[int, int], tmp_path: Path) -> None:
    pixels = np.zeros((*size, 3), np.uint8)
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    pixels[top : top + side, left : left + side] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", 8), torch.full((3, 8, 8), 255, dtype=torch.uint8))


def test_a_camera_that_was_turned(tmp_path: Path) -> None:
    pixels = draw(0, 8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter clockwise
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert torch.equal(read_image(tmp_path / "a.png", 8)[0], torch.from_numpy(np.rot90(pixels, -1).copy()))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    pixels = draw(0, 8, 8)
    Image.fromarray(pixels.astype(np.uint16) * 257).save(tmp_path / "a.png")
    assert torch.equal(read_image(tmp_path / "a.png", 8)[0], torch.from_numpy(pixels))


@pytest.mark.parametrize("mode", ["1", "P", "RGBA", "LA", "CMYK"])
def test_every_mode_becomes_grey_or_colour(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 255, np.uint8)).convert(mode)
    suffix = "tif" if mode == "CMYK" else "png"
    if mode in ("RGBA", "LA"):
        image.putalpha(0)  # nothing to be seen: white
    image.save(tmp_path / f"a.{suffix}")
    found = read_image(tmp_path / f"a.{suffix}", 8)
    assert found.shape == ((1, 8, 8) if mode == "1" else (3, 8, 8))
    assert found.float().mean() > 250


def test_splits_of_their_own_and_fractions(tmp_path: Path) -> None:
    root, other = folders(tmp_path / "a"), folders(tmp_path / "b", 3)
    data = load(root, tmp_path, validation_path=str(other), test_fraction=0.25)
    assert [len(part) for part in (data.train, data.validation, data.test)] == [9, 3, 3]  # type: ignore[arg-type]
    shares = load(root, tmp_path, test_fraction=0.25)
    assert [len(part) for part in (shares.train, shares.validation, shares.test)] == [6, 3, 3]  # type: ignore[arg-type]
    assert len({shares.fingerprint, data.fingerprint, load(root, tmp_path).fingerprint}) == 3


def test_classes_are_the_same_numbers_in_every_split(tmp_path: Path) -> None:
    root, other = folders(tmp_path / "a"), folders(tmp_path / "b", 3)
    for inside in (other / "bright").iterdir():
        inside.unlink()
    (other / "bright").rmdir()
    data = load(root, tmp_path, validation_path=str(other))
    assert sorted(int(row["labels"]) for row in data.validation) == [1, 2]  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"path": "/nowhere"}, "data.path=/nowhere is no file"),
        ({"test_path": "/nowhere"}, "data.test_path=/nowhere is no file"),
        ({"path": ["a", "b"]}, "must be one path"),
        ({"name": "org/images"}, "data.name=org/images is not for images yet"),
    ],
)
def test_what_can_be_seen_before_anything_is_loaded(fields: dict[str, Any], says: str) -> None:
    assert any(says in problem for problem in Images(label="x", **fields).problems("train"))


def test_a_folder_of_one_class_is_refused(tmp_path: Path) -> None:
    root = folders(tmp_path / "a", 1)
    with pytest.raises(UserError, match=r"has 1 folders of files in it: name a folder that has"):
        load(root, tmp_path)
