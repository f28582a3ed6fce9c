"""Which run is meant: by folder, adapter folder, MLflow id, and what ``best`` is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.use.best import find_best
from lora_exp.use.runs import FoundRun, base_named, find_run
from lora_exp.use_config import BestConfig

Train = Callable[..., Path]
NONE = TrackingConfig(enabled=False)


def find(name: str, tracking: TrackingConfig = NONE, **best: Any) -> FoundRun:
    return find_run(name, BestConfig(**best), tracking)


def job(
    folder: Path,
    losses: dict[int, float],
    saved: int,
    kept: tuple[int, ...] = (),
    run_id: str | None = None,
    **more: Any,
) -> Path:
    """What a training leaves behind that a run is chosen by: ``losses`` by step."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter/adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / "config.yaml").write_text("model: {label: tiny}\ntrain: {keep: null, early_stopping: null}\n")
    records = [
        {"lane": "default", "step": step, "eval/loss": loss, "eval/accuracy": 1 / loss} for step, loss in losses.items()
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    best = min((step for step in losses if step), key=lambda step: losses[step])
    result = {
        "eval_loss": losses[saved], "eval_loss_before": losses[0],
        "metrics": {"accuracy": 1 / losses[saved], "number_match": saved},
        "trainable": 1, "total": 2, "adapter_bytes": 3, "peak_memory_gib": 0.0, "wall_s": 1.0,
        "adapter": str(folder / "adapter"), "run_id": run_id, "step": saved,
        "best_loss": losses[best], "best_step": best, "test": {"loss": 1.0},
    }  # fmt: skip
    outcome = {"number": 0, "status": "FINISHED", "overrides": [], "values": {"task": "train"}, "error": None}
    (folder / "result.json").write_text(json.dumps({**outcome, "result": result, **more}))
    for step in kept:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    return folder


def test_a_folder_is_a_run_s_an_adapter_s_or_a_checkpoint_s(workplace: Path) -> None:
    run = job(workplace / "day/12-30", {0: 4.0, 2: 2.0, 4: 3.0}, 4, kept=(2, 4))
    assert find("day/12-30") == find(str(run / "adapter")) == FoundRun(run / "adapter", run)
    assert (find(str(run)).title, find(str(run)).slug, find(str(run)).at_step) == ("day/12-30", "day-12-30", 4)
    assert find(str(run)).evaluation["eval/loss"] == 3.0
    earlier = find(str(run / "checkpoints/step_00000002"))
    assert earlier == FoundRun(run / "adapter", run, 2)
    assert (earlier.at_step, earlier.evaluation["eval/loss"], earlier.slug) == (2, 2.0, "day-12-30-step-2")
    assert find(str(earlier.place)) == earlier
    shutil.copytree(run / "adapter", workplace / "alone")
    alone = find("alone")
    assert alone == FoundRun(workplace / "alone")
    assert (alone.run_id, alone.config, alone.at_step, base_named(alone.adapter)) == (None, {}, None, "org/base")


def test_what_is_no_run_is_said_with_the_next_move(workplace: Path) -> None:
    job(workplace / "sweep/0", {0: 4.0, 2: 2.0}, 2)
    (workplace / "empty").mkdir()
    (workplace / "begun").mkdir()
    (workplace / "begun/config.yaml").write_text("model: {}")
    for name, said in {
        "nowhere": "neither a folder, nor the id",
        "sweep": r"name one of its jobs \(sweep/0\), or run=best best.of=sweep",
        "empty": "holds neither a run",
        "begun": "has saved no adapter yet",
        "0" * 32: "tracking=none switches off: name a folder",
    }.items():
        with pytest.raises(UserError, match=said):
            find(name)


def test_best_is_the_best_of_a_sweep_and_of_its_kept_steps(workplace: Path, caplog: pytest.LogCaptureFixture) -> None:
    sweep = workplace / "outputs/sweeps/day/12-30"
    job(sweep / "0", {0: 4.0, 2: 3.0, 4: 2.9}, 4, kept=(2, 4))
    one = job(sweep / "1", {0: 4.0, 2: 2.5, 4: 3.1}, 4, kept=(2, 4))
    assert find("best") == FoundRun(one / "adapter", one, 2)
    assert find("best", of=str(one)).step == 2
    shutil.rmtree(one / "checkpoints/step_00000002")
    caplog.set_level("INFO")
    assert find("best") == FoundRun(sweep / "0/adapter", sweep / "0")
    assert find("best", of=str(one)).step is None
    assert "step 2 had 2.5000, but its checkpoint is gone" in caplog.text
    saved_best = job(sweep / "2", {0: 4.0, 2: 1.5, 4: 3.1}, 2, kept=(2, 4))
    assert find("best") == FoundRun(saved_best / "adapter", saved_best)


def test_best_by_other_metrics(workplace: Path) -> None:
    sweep = workplace / "outputs/sweeps/day/12-30"
    low = job(sweep / "0", {0: 4.0, 3: 1.0}, 3)
    high = job(sweep / "1", {0: 4.0, 2: 2.0, 9: 3.0}, 9, kept=(2,))
    assert find("best", metric="eval/accuracy").folder == find("best", metric="accuracy").folder == low
    assert find("best", metric="eval/loss", better="higher") == FoundRun(high / "adapter", high)
    assert find("best", metric="written/number_match").folder == high
    for best, said in {
        ("eval/loss", "sideways"): "best.better=sideways is not known: choose one of lower, higher",
        ("eval/unheard", None): "does not say which is better: add best.better",
        ("eval/unheard", "lower"): "has eval/unheard: name another best.metric",
        ("test/loss", None): "chooses by test rows",
    }.items():
        with pytest.raises(UserError, match=said):
            find("best", metric=best[0], better=best[1])


def test_best_of_the_newest_sweep_that_has_trained(workplace: Path) -> None:
    with pytest.raises(UserError, match=r"there is no sweep below \./outputs: name a run"):
        find("best")
    job(workplace / "outputs/runs/day/1", {0: 4.0, 2: 2.0}, 2)
    with pytest.raises(UserError, match=r"name a run \(run=outputs/runs/day/1\)"):
        find("best")
    trained = job(workplace / "outputs/sweeps/day/1/0", {0: 4.0, 2: 2.0}, 2)
    used = {"result": {"figures": {}, "files": [], "run_id": None}, "values": {"task": "evaluate"}}
    job(workplace / "outputs/sweeps/day/2/0", {0: 4.0, 2: 1.0}, 2, **used)
    failed = {"status": "FAILED", "result": None}
    job(workplace / "outputs/sweeps/day/1/1", {0: 4.0, 2: 1.0}, 2, **failed)
    assert find("best").folder == trained


def test_an_id_is_a_run_here_or_its_artifacts(train: Train, workplace: Path) -> None:
    first = train("one", "train.keep=best", tracked=True)
    run_id = str(json.loads((first / "result.json").read_text())["result"]["run_id"])
    section = TrackingConfig()
    assert find(run_id, section) == FoundRun(first / "adapter", first)
    step, evaluation = find(run_id, section).at_step, find(run_id, section).evaluation
    first.rename(workplace / "moved")
    fetched = find(run_id, section)
    assert fetched.folder == workplace / "cache/runs" / run_id
    assert (fetched.run_id, fetched.at_step, fetched.evaluation) == (run_id, step, evaluation)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (fetched.adapter / name).read_bytes() == (workplace / "moved/adapter" / name).read_bytes()
    assert find(run_id, section) == fetched
    (fetched.adapter / "adapter_model.safetensors").chmod(0o644)
    (fetched.adapter / "adapter_model.safetensors").write_bytes(b"damaged")
    assert find(run_id, section) == fetched
    assert (fetched.adapter / "adapter_model.safetensors").read_bytes() != b"damaged"
    with pytest.raises(UserError, match="MLflow has no run ffff"):
        find("f" * 32, section)


def test_a_folder_that_a_later_run_has_taken_is_not_the_earlier_one(train: Train, workplace: Path) -> None:
    folder = train("one", tracked=True)
    earlier = json.loads((folder / "result.json").read_text())["result"]
    again = train("one", "seed=1", tracked=True)
    assert again == folder
    section = TrackingConfig()
    assert find(earlier["run_id"], section).folder == workplace / "cache/runs" / earlier["run_id"]
    assert find(earlier["run_id"], section).evaluation["eval/loss"] == earlier["eval_loss"]


def test_best_of_an_experiment_and_of_a_sweep_s_run(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    done = cli("-m", *tiny_overrides, "optimizer.lr=1e-2,1e-3", "tracking.experiment=mine")
    assert done.code == 0, done.err
    (sweep,) = workplace.glob("outputs/sweeps/*/*")
    losses = {place: json.loads((sweep / place / "result.json").read_text())["result"]["eval_loss"] for place in "01"}
    best = min(losses, key=lambda place: losses[place])
    parent = json.loads((sweep / "sweep.json").read_text())["parent_run_id"]
    section = TrackingConfig(uri=f"sqlite:///{workplace}/outputs/mlflow.db")
    for of in ("mine", parent, str(sweep), None):
        assert find_best(BestConfig(of=of), section).folder == sweep / best
    with pytest.raises(UserError, match="no MLflow experiment"):
        find_best(BestConfig(of="another"), section)
    other = "1" if best == "0" else "0"
    shutil.move(sweep / best, workplace / "away")
    assert find_best(BestConfig(of="mine"), section).folder == sweep / other
    assert "The folders of 1 of 2 runs of mine are not here" in capfd.readouterr().out
    own = str(json.loads((sweep / other / "result.json").read_text())["result"]["run_id"])
    assert find_best(BestConfig(of=own), section).folder == sweep / other
