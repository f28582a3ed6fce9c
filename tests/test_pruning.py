"""Jobs that end because others do better: as Optuna ends them, and never the last of its kind."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import Config, PruneConfig
from lora_exp.errors import UserError
from lora_exp.job import METRICS_FILE, Job, Outcome, SyncResult, read_metrics, read_outcome, write_begun, write_outcome
from lora_exp.pruning import Pruning, problems, pruner_of
from lora_exp.training.best import Best

optuna = pytest.importorskip("optuna", reason="pip install 'lora_exp[optuna]'")
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
STEPS = tuple(range(2, 21, 2))
MEDIAN = PruneConfig("median", "MedianPruner", {"n_startup_trials": 2, "n_warmup_steps": 2})
HALVING = PruneConfig("halving", "SuccessiveHalvingPruner", {"min_resource": None, "reduction_factor": 2})


def curve(job: int) -> list[float]:
    """A loss by step; which of two jobs is better changes on the way."""
    level, slope = (7 * job) % 5, 0.05 + 0.03 * ((3 * job) % 4)
    return [3 + 0.3 * level - slope * math.sqrt(step) + 0.02 * math.sin(job + step) for step in STEPS]


def train(sweep: Path, number: int, section: PruneConfig, overrides: Sequence[str] = (), **how: Any) -> int | None:
    """One job from its beginning to its end, by the curve of its number. Returns the step at which it was cut."""
    job = Job(sweep / str(number), number, list(overrides), sweep_folder=sweep)
    job.folder.mkdir(parents=True)
    write_begun(job)
    best = Best(how.get("metric", "eval/loss"), how.get("higher_is_better", False))
    pruning = Pruning(section, job, best, STEPS[-1])
    values = [-value for value in curve(number)] if best.higher_is_better else curve(number)
    with (job.folder / METRICS_FILE).open("w") as stream:
        for step, value in zip(STEPS, values, strict=True):
            record = {"step": step, best.metric: value}
            stream.write(json.dumps(record) + "\n")
            stream.flush()
            pruning.consider(record)
            if best.should_stop:
                break
    status = how.get("ends", "FINISHED")
    write_outcome(job.folder, Outcome(number, status, list(overrides), {"task": "sync"}, SyncResult(0, 0, 0)))
    return best.cut_at


def by_optuna(section: PruneConfig, jobs: int, direction: str = "minimize") -> list[int | None]:
    """When Optuna's own loop cuts them, one after another."""
    cuts: list[int | None] = []

    def objective(trial: Any) -> float:
        values = curve(trial.number)
        for step, value in zip(STEPS, values, strict=True):
            trial.report(value if direction == "minimize" else -value, step)
            if trial.should_prune() and step < STEPS[-1]:
                cuts.append(step)
                raise optuna.TrialPruned
        cuts.append(None)
        return values[-1] if direction == "minimize" else -values[-1]

    study = optuna.create_study(pruner=pruner_of(section, STEPS[0]), direction=direction)
    study.optimize(objective, n_trials=jobs)
    return cuts


@pytest.mark.parametrize("section", [MEDIAN, HALVING], ids=["median", "halving"])
@pytest.mark.parametrize(("metric", "higher"), [("eval/loss", False), ("eval/accuracy", True)])
def test_jobs_are_cut_where_optunas_own_loop_cuts_them(
    section: PruneConfig, metric: str, higher: bool, tmp_path: Path
) -> None:
    ours = [train(tmp_path, number, section, metric=metric, higher_is_better=higher) for number in range(12)]
    assert ours == by_optuna(section, 12, "maximize" if higher else "minimize")
    assert {None} < set(ours)


@pytest.mark.parametrize("section", [MEDIAN, HALVING], ids=["median", "halving"])
def test_of_each_value_of_a_factor_to_keep_one_survives(section: PruneConfig, tmp_path: Path) -> None:
    ranks = [2, 4, 8, 2, 4, 8, 16, 2, 8, 16]
    plain = [train(tmp_path / "plain", number, section, [f"rank={rank}"]) for number, rank in enumerate(ranks)]
    kept = replace(section, keep=["rank"])
    cuts = [train(tmp_path / "kept", number, kept, [f"rank={rank}"]) for number, rank in enumerate(ranks)]
    survivors = {rank for rank, cut in zip(ranks, cuts, strict=True) if cut is None}
    assert survivors == set(ranks)
    assert {rank for rank, cut in zip(ranks, plain, strict=True) if cut is None} != set(ranks)
    assert any(cut is not None for cut in cuts)


def test_a_failed_job_is_no_survivor_of_its_kind(tmp_path: Path) -> None:
    kept = replace(MEDIAN, keep=["rank"])
    bad = max(range(3, 12), key=lambda number: curve(number)[0])
    for number in range(3):
        train(tmp_path, number, kept, ["rank=2"])
    train(tmp_path, 90, kept, ["rank=4"], ends="FAILED")
    assert train(tmp_path, bad, kept, ["rank=4"]) is None


def test_without_a_pruner_or_a_sweep_nothing_is_cut_and_an_old_cut_is_forgotten(tmp_path: Path) -> None:
    assert [train(tmp_path, number, PruneConfig()) for number in range(6)] == [None] * 6
    job = Job(tmp_path / "alone")
    job.folder.mkdir()
    (job.folder / "pruned.json").write_text("{}")
    best = Best()
    pruning = Pruning(MEDIAN, job, best, 10)
    pruning.consider({"step": 2, "eval/loss": 9.0})
    assert best.cut_at is None
    assert not (job.folder / "pruned.json").exists()


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (PruneConfig("x", "NoSuchPruner"), "needs optuna.pruners.NoSuchPruner, which Optuna"),
        (PruneConfig("median", "MedianPruner", {"n_startup": 1}), "does not suit MedianPruner"),
        (PruneConfig("h", "SuccessiveHalvingPruner", {"reduction_factor": 1}), "does not suit SuccessiveHalvingPruner"),
        (PruneConfig("median", "MedianPruner", keep=["rnak"]), "rnak is not a key of the config: did you mean rank?"),
        (PruneConfig(keep=["rank"]), "prune.keep has no meaning with prune=none"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_loaded(section: PruneConfig, said: str) -> None:
    (problem,) = problems(Config(prune=section))
    assert said in problem


def test_options_are_optunas(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="NoSuchPruner, which Optuna"):
        pruner_of(PruneConfig("x", "NoSuchPruner"), 1)


def test_a_pruned_run_is_finished_and_marked_and_can_go_on(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path
) -> None:
    from mlflow.tracking import MlflowClient

    long = ["train.steps=6", "train.eval_every=2", "train.save_every=2"]
    sweep = ["prune=median", "prune.options.n_startup_trials=1", "hydra.sweep.dir=sweep"]
    found = cli("-m", *tiny_overrides, *long, *sweep, "optimizer.lr=1e-2,1.1e-2,1e-6")
    assert found.code == 0, found.err
    assert "cut after 2 of 6 steps, as prune=median has it" in found.out
    cut, whole = (outcome(workplace / "sweep" / number) for number in ("2", "0"))
    assert (cut["pruned_at"], cut["step"], whole["pruned_at"], whole["step"]) == (2, 2, None, 6)
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    run = client.get_run(str(cut["run_id"]))
    assert (run.info.status, run.data.tags["pruned_at"]) == ("FINISHED", "2")
    assert "pruned_at" not in client.get_run(str(whole["run_id"])).data.tags
    assert "pruned" in (workplace / "sweep/comparison.md").read_text()
    rate = [point.value for point in client.get_metric_history(str(whole["run_id"]), "train/lr")][:2]
    begun = [record["train/lr"] for record in read_metrics(workplace / "sweep/2") if "train/lr" in record]
    assert begun == pytest.approx([value * 1e-6 / 1e-2 for value in rate])  # the schedule is that of the full length
    again = cli(*tiny_overrides, *long, "optimizer.lr=1e-6", f"resume={workplace / 'sweep/2'}", "hydra.run.dir=on")
    assert again.code == 0, again.err
    assert outcome(workplace / "on")["step"] == 6


def outcome(folder: Path) -> Mapping[str, Any]:
    found = read_outcome(folder)
    assert found is not None
    assert found.status == "FINISHED"
    return vars(found.result)
