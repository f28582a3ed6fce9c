"""A saved run's config can be run again, or used by a task on finished runs, whatever the defaults are by now."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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


def test_a_group_is_chosen_anew(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    folder = workplace / "outputs/runs/day/one"
    assert cli(*tiny_overrides, "rank=4", "tracking=none", f"hydra.run.dir={folder}").code == 0
    again = cli(f"rerun={folder}", "adapter=dora", "adapter.options={}")
    assert again.code == 0, again.err
    one, two = results(workplace)
    changed = {key for key in {*one["values"], *two["values"]} if one["values"].get(key) != two["values"].get(key)}
    assert changed == {"adapter"}


def test_what_cannot_be_rerun_is_said(cli: Cli, workplace: Path) -> None:
    saved = workplace / "job/.hydra"
    saved.mkdir(parents=True)
    (saved / "config.yaml").write_text(yaml.safe_dump({"model": {}, "adapter": {}, "rank": 2}))
    for arguments, said in {
        ("--config-path", str(saved), "--config-name", "config"): f"run it again by rerun={workplace / 'job'}",
        (f"rerun={workplace}",): "no config.yaml of a run",
        (f"rerun={workplace / 'job'}", "adapter=dora"): "data.label is not set: add data.label=VALUE",
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


@pytest.fixture
def runs(cli: Cli, tiny_overrides: list[str], workplace: Path) -> list[Path]:
    """Two untracked runs of different ranks."""
    found = [workplace / f"outputs/runs/day/{name}" for name in ("one", "two")]
    for rank, folder in enumerate(found, 2):
        done = cli(*tiny_overrides, f"rank={rank}", "tracking=none", f"hydra.run.dir={folder}", "seed=7")
        assert done.code == 0, done.err
    return found


def used(workplace: Path) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The result and the config of each use, in order."""
    folders = sorted(file.parent for file in workplace.glob("outputs/used/*/*/**/result.json"))
    configs = [yaml.safe_load((folder / ".hydra/config.yaml").read_text()) for folder in folders]
    return [
        (json.loads((folder / "result.json").read_text()), each) for folder, each in zip(folders, configs, strict=True)
    ]


@pytest.mark.parametrize("form", ["repeated", "list"])
def test_the_first_of_several_runs_brings_the_config(form: str, cli: Cli, runs: list[Path], workplace: Path) -> None:
    one, two = runs
    named = [f"run={one}", f"run={two}"] if form == "repeated" else [f"run=[{one},{two}]"]
    done = cli("task=evaluate", *named, "tracking=none", "evaluate.merged=false", "evaluate.rows=2")
    assert done.code == 0, done.err
    ((result, config),) = used(workplace)
    assert result["status"] == "FINISHED"
    assert (config["rank"], config["seed"], config["data"]["block_size"]) == (2, 7, 16)
    assert config["run"] == [str(one), str(two)]
    assert (config["evaluate"]["rows"], config["task"], config["export"]["format"]) == (2, "evaluate", "peft")
    assert not list(workplace.glob("outputs/runs/2*"))


def test_other_keys_are_swept_over_the_same_runs(cli: Cli, runs: list[Path], workplace: Path) -> None:
    one, two = runs
    asked = ["-m", "task=evaluate", f"run=[{one},{two}]", "tracking=none", "evaluate.merged=false"]
    done = cli(*asked, "evaluate.rows=2,4")
    assert done.code == 0, done.err
    found = used(workplace)
    assert [config["evaluate"]["rows"] for _, config in found] == [2, 4]
    assert all(config["run"] == [str(one), str(two)] for _, config in found)
    losses = [f"{result['result']['figures']['loss']:.4f}" for result, _ in found]
    assert all(loss in done.out for loss in losses)  # in the sweep's table
    assert not list(workplace.glob("outputs/sweeps/*"))
    for runs_swept in (f"run={one},{two}", f"run=choice({one},{two})"):
        done = cli("-m", "task=evaluate", runs_swept, "tracking=none")
        assert done.code == 1
        assert "is not swept: several runs are a list, run=[A,B], or run=A run=B" in done.err
    done = cli("-m", "task=evaluate,generate", f"run={one}")
    assert done.code == 1
    assert "task=evaluate,generate is not swept here" in done.err


def test_a_group_may_be_chosen_anew(cli: Cli, runs: list[Path], workplace: Path, text_file: Path) -> None:
    choices = ["data=chat", f"data.path={text_file}", "data.layout=plain"]  # a chat of nothing that is one
    done = cli("task=evaluate", f"run={runs[0]}", "tracking=none", *choices)
    assert done.code == 1
    assert "data.path" in done.err
    assert "Traceback" not in done.err
    done = cli("task=evaluate", f"run={runs[0]}", "tracking=none", "optimizer=adamw", "plan=default", "export=gguf")
    assert done.code == 0, done.err
    ((_, _), (_, config)) = used(workplace)
    assert (config["export"]["format"], config["data"]["path"]) == ("gguf", str(text_file))


def test_an_older_config_lacks_what_came_later(cli: Cli, runs: list[Path], workplace: Path) -> None:
    file = runs[0] / "config.yaml"
    config = yaml.safe_load(file.read_text())
    for later in ("export", "best", "evaluate", "generate", "serve", "task", "start", "machine", "parallel", "trainer"):
        del config[later]
    file.write_text(yaml.safe_dump(config))
    done = cli("task=evaluate", f"run={runs[0]}", "tracking=none")
    assert done.code == 0, done.err
    result = json.loads((runs[0] / "result.json").read_text())["result"]
    ((outcome, _),) = used(workplace)
    assert outcome["result"]["figures"]["loss"] == result["eval_loss"]
    step = sorted((runs[0] / "checkpoints").iterdir())[0]
    assert cli("task=evaluate", f"run={step}", "tracking=none").code == 0


def test_what_stands_in_a_file_alone_is_refused(cli: Cli, runs: list[Path], workplace: Path) -> None:
    mine = workplace / "mine/experiment"
    mine.mkdir(parents=True)
    (mine / "use.yaml").write_text(f"# @package _global_\ntask: evaluate\nrun: {runs[0]}\n")
    for mode in ((), ("-m",)):
        done = cli("--config-dir", str(mine.parent), "+experiment=use", "tracking=none", *mode)
        assert done.code == 1
        assert f"task=evaluate and run={runs[0]} stand in a file: type both on the command line" in done.err
        assert "Traceback" not in done.err


def test_tasks_that_are_not_about_runs_take_none(cli: Cli, runs: list[Path], tiny_overrides: list[str]) -> None:
    for task in ("train", "plan"):
        done = cli(*tiny_overrides, f"task={task}", f"run={runs[0]}", "tracking=none")
        assert done.code == 1
        assert f"which task={task} is not about: use task=analyse, evaluate, " in done.err
    done = cli("task=evaluate", "run=nowhere", "tracking=none")
    assert done.code == 1
    assert "run=nowhere is neither a folder" in done.err
    assert "Traceback" not in done.err


def test_where_ids_are_looked_up_is_the_chosen_tracking_s(cli: Cli, runs: list[Path], workplace: Path) -> None:
    mine = workplace / "mine/tracking"
    mine.mkdir(parents=True)
    (mine / "mine.yaml").write_text(f"enabled: true\nuri: sqlite:///{workplace}/outputs/mlflow.db\n")
    (workplace / "outputs/mlflow.db").rename(workplace / "outputs/mine.db")
    (mine / "mine.yaml").write_text(f"enabled: true\nuri: sqlite:///{workplace}/outputs/mine.db\n")
    for run_id in ("f" * 32, "1234567890" * 3 + "12"):
        done = cli("--config-dir", str(mine.parent), "task=evaluate", f"run={run_id}", "tracking=mine")
        assert done.code == 1
        assert f"MLflow has no run {run_id}" in done.err
    assert not (workplace / "outputs/mlflow.db").exists()
    done = cli("task=evaluate", f"run={'f' * 32}", "tracking=none")
    assert "which tracking=none switches off: name a folder" in done.err


def test_an_adapter_that_lies_alone_brings_its_base(cli: Cli, runs: list[Path], workplace: Path) -> None:
    (runs[0] / "adapter").rename(workplace / "alone")
    file = workplace / "alone/adapter_config.json"
    facts = json.loads(file.read_text())
    base = facts["base_model_name_or_path"]
    done = cli("task=generate", "run=alone", "tracking=none", "generate.prompt=the sea", "device=cpu", "--cfg", "job")
    assert done.code == 0, done.err
    assert yaml.safe_load(done.out)["model"]["name"] == base
    file.write_text(json.dumps({**facts, "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct"}))
    done = cli("task=generate", "run=alone", "tracking=none", "generate.prompt=the sea", "--cfg", "job")
    assert yaml.safe_load(done.out)["model"]["label"] == "smollm2_135m"
    file.unlink()
    (workplace / "alone/adapter_model.safetensors").rename(workplace / "alone/model.safetensors")
    done = cli("task=generate", "run=alone", "tracking=none", "generate.prompt=the sea")
    assert done.code == 1
    assert "holds a model and no adapter: use it as a base, model=hf model.path=" in done.err


def test_best_is_found_after_a_sweep(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli("-m", *tiny_overrides, "optimizer.lr=1e-5,1e-2", "tracking=none")
    assert done.code == 0, done.err
    done = cli("task=evaluate", "run=best", "tracking=none")
    assert done.code == 0, done.err
    results = [json.loads(file.read_text())["result"] for file in workplace.glob("outputs/sweeps/*/*/*/result.json")]
    best = min(result["best_loss"] for result in results)
    ((outcome, config),) = used(workplace)
    assert outcome["result"]["figures"]["loss"] == best
    assert config["optimizer"]["lr"] == 1e-2
    assert "after optimizer step 4" in done.out


@pytest.mark.slow
def test_several_processes_use_a_run_once(runs: list[Path], workplace: Path) -> None:
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", "-m", "lora_exp"]
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    asked = [*command, "task=evaluate", f"run={runs[0]}", "tracking=none"]
    done = subprocess.run(asked, capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("text, validation: 4 of") == 1
    assert len(used(workplace)) == 1
