"""A saved run's config can be run again, whatever the defaults are by now."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Cli = Callable[..., Any]


def results(workplace: Path) -> list[dict[str, Any]]:
    found = sorted(workplace.glob("outputs/runs/*/*/result.json"))
    return [json.loads(file.read_text()) for file in found]


def test_it_ends_in_the_same_values_and_takes_others_on_top(
    cli: Cli, tiny_overrides: list[str], workplace: Path
) -> None:
    first = cli(*tiny_overrides, "adapter=dora", "rank=4", "tracking=none")
    assert first.code == 0, first.err
    (folder,) = workplace.glob("outputs/runs/*/*")
    again = cli(f"rerun={folder}")
    assert again.code == 0, again.err
    other = cli("rank=2", f"rerun={folder}")
    assert other.code == 0, other.err
    one, two, three = results(workplace)
    assert one["values"] == two["values"]
    assert one["result"]["eval_loss"] == two["result"]["eval_loss"]
    assert {**one["values"], "rank": 2} == {**three["values"], "scale": one["values"]["scale"]}


def test_what_cannot_be_rerun_is_said(cli: Cli, workplace: Path) -> None:
    saved = workplace / "job/.hydra"
    saved.mkdir(parents=True)
    (saved / "config.yaml").write_text(yaml.safe_dump({"model": {}, "adapter": {}, "rank": 2}))
    for arguments, said in {
        ("--config-path", str(saved), "--config-name", "config"): f"run it again by rerun={workplace / 'job'}",
        (f"rerun={workplace}",): "no config.yaml of a run",
        (f"rerun={workplace / 'job'}", "adapter=dora"): "adapter=dora chooses a file",
    }.items():
        done = cli(*arguments)
        assert done.code == 1
        assert said in done.err
        assert "Traceback" not in done.err


def test_a_key_that_is_no_longer_known_is_named(cli: Cli, workplace: Path) -> None:
    saved = workplace / "job"
    saved.mkdir()
    (saved / "config.yaml").write_text(yaml.safe_dump({"model": {"kind": "causal_lm"}, "adapter": {}, "rnak": 2}))
    done = cli(f"rerun={saved}")
    assert done.code == 1
    assert "rnak" in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("kind", ["job", "all"])
def test_a_login_in_a_file_of_ones_own_is_not_printed(kind: str, cli: Cli, workplace: Path) -> None:
    mine = workplace / "mine/experiment"
    mine.mkdir(parents=True)
    (mine / "a.yaml").write_text("# @package _global_\ntracking: {uri: 'http://user:Zq7marked@host'}\n")
    done = cli("--config-dir", str(mine.parent), "+experiment=a", "--cfg", kind)
    assert done.code == 1
    assert "tracking.uri holds a login" in done.err
    assert "Zq7marked" not in done.out + done.err


def test_a_secret_of_the_environment_is_not_printed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "Zq7markedToken")
    done = cli("tracking.experiment=${oc.env:HF_TOKEN}", "--cfg", "job", "--resolve")
    assert done.code == 0, done.err
    assert "experiment: '***'" in done.out or "experiment: ***" in done.out
    assert "Zq7marked" not in done.out
