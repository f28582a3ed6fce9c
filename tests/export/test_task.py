"""``task=export`` and ``task=verify`` from the command line, on tiny runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

Cli = Callable[..., Any]
Finished = Callable[..., Path]
Facts = Callable[[Path], dict[str, Any]]
EXPORTS = Path("outputs/exports")


def export(cli: Cli, folder: Path, kind: str, *more: str) -> Path:
    done = cli("task=export", f"run={folder}", f"export={kind}", "tracking=none", *more)
    assert done.code == 0, done.err
    return EXPORTS / f"day-{folder.name}-{kind}"


@pytest.mark.parametrize("kind", ["merged", "peft"])
def test_a_run_is_exported_verified_and_verified_again(
    kind: str, cli: Cli, finished: Finished, provenance: Facts, workplace: Path
) -> None:
    run = finished("adapter=dora")
    done = cli("task=export", f"run={run}", f"export={kind}", "tracking=none", "export.texts=2", "export.tokens=8")
    assert done.code == 0, done.err
    assert "after optimizer step 4" in done.out
    assert "are free" in done.out
    target = EXPORTS / f"day-run-{kind}"
    facts = provenance(target)
    checked = facts["verification"]
    assert (checked["texts"], checked["tokens"]) == (2, 8)
    assert checked["source"] == "validation rows of text"
    assert checked["max_logit"] <= 1e-4
    assert 0 <= checked["mean_kl"] <= 1e-7
    result = json.loads((run / "result.json").read_text())["result"]
    assert facts["metrics"]["eval/loss"] == result["eval_loss"]
    assert facts["data_fingerprint"] == result["data_fingerprint"]
    assert facts["optimizer_step"] == 4
    assert facts["config"]["rank"] == 8
    written = {path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file()}
    assert set(facts["files"]) == written - {"provenance.json"}
    assert (target / "tokenizer.json").is_file()
    assert [path.name for path in EXPORTS.iterdir()] == [target.name]
    again = cli("task=verify", f"run={target}", "tracking=none")
    assert again.code == 0, again.err
    assert "files" in again.out
    outcome = sorted(workplace.glob("outputs/used/*/*/result.json"))[-1]
    figures = json.loads(outcome.read_text())["result"]["figures"]
    assert figures["max_logit"] == pytest.approx(checked["max_logit"], abs=1e-5)


def test_the_card_is_in_the_hubs_form_and_shows_the_hashes_of_the_run(
    cli: Cli, finished: Finished, provenance: Facts
) -> None:
    run = finished()
    target = export(cli, run, "merged")
    card, facts = ModelCard.load(target / "README.md"), provenance(target)
    assert card.data.library_name == "transformers"
    assert {"lora_exp", "lora", "merged"} <= set(card.data.tags)
    assert card.data.metrics == ["perplexity"]
    assert card.data.pipeline_tag == "text-generation"
    for name in ("base_files_sha256", "base_values_sha256", "adapter_sha256"):
        assert f"{name}: `{facts[name]}`" in card.text
    adapter_card = (run / "adapter/README.md").read_text()
    for name in ("base_files_sha256", "base_values_sha256"):
        assert name in adapter_card
        assert facts[name] in adapter_card


def test_its_run_in_mlflow_is_told_and_stays_as_it_ended(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    from mlflow.tracking import MlflowClient

    folder = workplace / "outputs/runs/day/run"
    assert cli(*tiny_overrides, f"hydra.run.dir={folder}").code == 0
    run_id = json.loads((folder / "result.json").read_text())["result"]["run_id"]
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    before = client.get_run(run_id).info
    done = cli("task=export", f"run={run_id}", "export=peft")
    assert done.code == 0, done.err
    told = client.get_run(run_id)
    kept = json.loads((EXPORTS / "day-run-peft/provenance.json").read_text())["verification"]
    for name in ("max_logit", "mean_kl"):
        assert told.data.metrics[f"export/peft/{name}"] == pytest.approx(kept[name])
    assert Path(told.data.tags["export.peft"]) == (workplace / EXPORTS / "day-run-peft")
    assert (told.info.status, told.info.end_time) == (before.status, before.end_time)


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_its_files_are_open_to_whom_the_umask_says(umask: int, cli: Cli, finished: Finished) -> None:
    run, before = finished(), os.umask(umask)
    try:
        assert cli("task=export", f"run={run}", "export=peft", "export.verify=false", "tracking=none").code == 0
    finally:
        os.umask(before)
    files = [file for file in (EXPORTS / "day-run-peft").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o666 & ~umask}


def test_an_earlier_step_is_exported_as_it_was_then(cli: Cli, finished: Finished, provenance: Facts) -> None:
    run = finished("train.save_every=2", "train.keep_checkpoints=9")
    early, late = run / "checkpoints/step_00000002", run
    places = []
    for place in (early, late):
        done = cli("task=export", f"run={place}", "export=merged", "tracking=none")
        assert done.code == 0, done.err
        assert f"after optimizer step {2 if place == early else 4}" in done.out
        places.append(EXPORTS / ("day-run-step-2-merged" if place == early else "day-run-merged"))
    steps = [provenance(place)["optimizer_step"] for place in places]
    assert steps == [2, 4]
    one, two = (load_file(place / "model.safetensors") for place in places)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(one[name], two[name])


def test_an_existing_folder_stays_unless_it_may_be_replaced(cli: Cli, finished: Finished, workplace: Path) -> None:
    run = finished()
    target = export(cli, run, "merged")
    before = (target / "provenance.json").read_bytes()
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none")
    assert done.code == 1
    assert "is there already: add export.overwrite=true" in done.err
    assert (target / "provenance.json").read_bytes() == before
    assert cli("task=export", f"run={run}", "export=merged", "tracking=none", "export.overwrite=true").code == 0
    assert (target / "provenance.json").read_bytes() != before
    (workplace / "mine").mkdir()
    (workplace / "mine/thesis.txt").write_text("years")
    command = ["task=export", f"run={run}", "export=merged", "tracking=none", "export.overwrite=true"]
    done = cli(*command, "export.path=mine")
    assert done.code == 1
    assert "is no export, and is not replaced" in done.err
    assert (workplace / "mine/thesis.txt").read_text() == "years"


def test_what_is_too_far_off_is_not_exported(cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    import lora_exp.export.merging as room

    whole = room.save_plain

    def damaged(model: Any, folder: Path, shard_gb: float) -> None:
        whole(model, folder, shard_gb)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
        save_file(tensors, file, {"format": "pt"})

    monkeypatch.setattr(room, "save_plain", damaged)
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none")
    assert done.code == 1
    assert "answers otherwise than the trained model: largest difference of a logit" in done.err
    assert "Nothing was exported" in done.err
    assert list(EXPORTS.iterdir()) == []
    lax = cli("task=export", f"run={run}", "export=merged", "tracking=none", "export.max_logit=99", "export.max_kl=99")
    assert lax.code == 0, lax.err


def test_what_the_runtime_does_not_read_is_not_exported(
    cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch, workplace: Path
) -> None:
    run = finished()
    import lora_exp.export.merging as room

    whole = room.save_plain

    def cut_short(model: Any, folder: Path, shard_gb: float) -> None:
        whole(model, folder, shard_gb)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:500])

    monkeypatch.setattr(room, "save_plain", cut_short)
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none")
    assert done.code == 1
    assert "plain transformers does not read what was written" in done.err
    assert "The traceback is in" in done.err
    assert list(EXPORTS.iterdir()) == []
    (filed,) = workplace.glob("outputs/used/*/*/traceback.txt")
    assert "from_pretrained" in filed.read_text()


@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_verify_names_what_was_tampered_with(damage: str, cli: Cli, finished: Finished) -> None:
    target = export(cli, finished(), "merged")
    for name in ("config.json", "tokenizer.json"):
        if damage == "changed":
            (target / name).write_text((target / name).read_text() + " ")
        else:
            (target / name).unlink()
    done = cli("task=verify", f"run={target}", "tracking=none")
    assert done.code == 1
    said = "was changed" if damage == "changed" else "is missing"
    assert f"config.json {said}; tokenizer.json {said}" in done.err


def test_verify_notices_a_base_that_is_another(cli: Cli, finished: Finished, tiny_llama: Path, workplace: Path) -> None:
    target = export(cli, finished(), "peft")
    other = workplace / "other"
    shutil.copytree(tiny_llama, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"] *= 1.2
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert cli("task=verify", f"run={target}", "tracking=none").code == 0
    done = cli("task=verify", f"run={target}", "tracking=none", f"model.path={other}")
    assert done.code == 1
    assert "answers otherwise than the trained model" in done.err


def test_a_full_disk_is_said_beforehand_and_leaves_nothing(
    cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished()
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 1000})())
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none")
    assert done.code == 1
    assert "make room, or name a folder on another disk" in done.err
    assert not EXPORTS.exists() or list(EXPORTS.iterdir()) == []


@pytest.mark.parametrize("where", ["lora_exp.export.merging.save_plain", "lora_exp.export.reference.save"])
def test_a_disk_that_fills_up_meanwhile_leaves_nothing(
    where: str, cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(where, full)
    done = cli("task=export", f"run={run}", "export=merged", "tracking=none")
    assert done.code == 1
    assert "The disk is full" in done.err
    assert "Traceback" not in done.err
    assert list(EXPORTS.iterdir()) == []


BAD = [
    (["run=nowhere"], "run=nowhere is neither a folder"),
    ([], "task=export is about a finished run: add run="),
    (["run=RUN", "export=mergd"], "did you mean merged"),
    (["run=RUN", "export=merged", "export.dtype=float8"], "export.dtype=float8 is not known"),
    (["run=RUN", "export=merged", "export.quantise=int3"], "export.quantise=int3 is not known"),
    (["run=RUN", "export=merged", "export.shard_gb=0"], "export.shard_gb=0.0 must be above 0"),
    (["run=RUN", "export.texts=0"], "export.texts=0 is below 1"),
    (["run=RUN", "export.tokens=1"], "export.tokens=1 is below 2"),
    (["run=RUN", "export.max_logit=-1"], "export.max_logit=-1.0 is not 0 or more"),
    (["run=[RUN,RUN/checkpoints/step_00000002]"], "about 1 run, and 2 are named"),
    (["run=RUN", "export=mlflow", "tracking.register=a/b"], "is no name for MLflow's registry"),
    (["run=RUN", "tracking.register=mine"], "tracking.register=mine is for MLflow models: use export=mlflow"),
    (["run=RUN", "export=mlflow", "tracking=none", "tracking.register=mine"], "which tracking=none switches off"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(arguments) for arguments, _ in BAD])
def test_bad_input_is_one_clear_error(
    arguments: list[str], says: str, cli: Cli, finished: Finished, workplace: Path
) -> None:
    run = finished()
    done = cli("task=export", *(argument.replace("RUN", str(run)) for argument in arguments))
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err
    assert not EXPORTS.exists()


@pytest.mark.parametrize(
    ("name", "says"),
    [("RUN", "is no export"), ("nowhere", "is no export"), ("", "task=verify is about an export")],
)
def test_what_is_no_export_is_not_verified(name: str, says: str, cli: Cli, finished: Finished) -> None:
    run = finished()
    done = cli("task=verify", *([f"run={name.replace('RUN', str(run))}"] if name else []))
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err


def test_an_export_of_a_whole_model_is_no_run(cli: Cli, finished: Finished) -> None:
    target = export(cli, finished(), "merged")
    done = cli("task=export", f"run={target}", "export=peft", "tracking=none")
    assert done.code == 1
    assert f"use it as a base by model.path={target}" in done.err


def test_no_secret_is_written(cli: Cli, finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    run = finished()
    monkeypatch.setenv("HF_TOKEN", "Zq7markedToken")
    target = export(cli, run, "merged", "model.revision=Zq7markedToken")
    for file in target.rglob("*"):
        if file.is_file():
            assert b"Zq7marked" not in file.read_bytes(), file


def test_front_matter_is_yaml(cli: Cli, finished: Finished) -> None:
    target = export(cli, finished(), "peft")
    front = (target / "README.md").read_text().split("---\n")[1]
    assert yaml.safe_load(front)["library_name"] == "peft"
