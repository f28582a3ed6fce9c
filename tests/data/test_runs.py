"""From the command line: files of several formats with weights, a test split, and broken records."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

Cli = Callable[..., Any]


def write_sources(folder: Path) -> None:
    lines = [f"line {index} of the people and the sea" for index in range(60)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"body": line}) + "\n" for line in lines))
    (folder / "b.csv").write_text("id,body\n" + "".join(f'{index},"{line}, b"\n' for index, line in enumerate(lines)))
    (folder / "test.json").write_text(json.dumps({"data": [{"body": f"{line} t"} for line in lines]}))


def test_sources_with_weights_and_a_test_split(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    write_sources(workplace)
    with (workplace / "a.jsonl").open("a") as file:
        file.write('{"body": "half a li\n{"body": ""}\n')
    own = ["data.path={a.jsonl: 2, b.csv: 0.5}", "data.test_path=test.json", "data.text_field=body"]
    done = cli(*tiny_overrides, *own)
    assert done.code == 1
    assert "2 of 182 records cannot be used (1.10%), and data.max_bad_fraction=0:" in done.err
    assert "a.jsonl, line 61: not JSON" in done.err
    assert "a.jsonl, line 62: body is empty" in done.err
    assert "pass over them by data.max_bad_fraction=0.011" in done.err
    done = cli(*tiny_overrides, *own, "data.max_bad_fraction=0.02")
    assert done.code == 0, done.err
    assert "2 of 182 records cannot be used and are passed over:" in done.out
    assert "row    line 0 of the people and the sea" in done.out
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    (run,) = client.search_runs(["1"], "attributes.status = 'FINISHED'")
    data = {each.tags[0].value: each.dataset for each in run.inputs.dataset_inputs}
    assert json.loads(data["test"].source) == {"path": "test.json"}
    assert json.loads(data["training"].source) == {
        "path": {"a.jsonl": 2, "b.csv": 0.5},
        "held out for validation": 0.05,
    }
    found = [json.loads(file.read_text())["result"] for file in (workplace / "outputs/runs").rglob("result.json")]
    (finished,) = [each for each in found if each]
    assert finished["data_fingerprint"] == run.data.tags["data_fingerprint"]
    assert finished["test"]["loss"] == run.data.metrics["test/loss"]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["data.path=[a.jsonl,nowhere.csv]"], "data.path=nowhere.csv does not exist"),
        (["data.text_field=bodi"], "a.jsonl, line 1: lacks bodi (it has body): set data.text_field=body"),
        (["data.test_path=a.jsonl"], "has no file that is not held out"),
    ],
)
def test_what_cannot_be_used_is_said_before_the_base_is_loaded(
    cli: Cli,
    tiny_overrides: list[str],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: list[str],
    says: str,
) -> None:
    write_sources(workplace)
    monkeypatch.setattr("lora_exp.models.load_base", lambda *_, **__: pytest.fail("the base was loaded"))
    done = cli(*tiny_overrides, "data.path=a.jsonl", "data.text_field=body", *overrides)
    assert done.code == 1
    assert says in done.err
