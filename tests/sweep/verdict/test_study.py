"""Studies that are run, with a tiny model, from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lora_exp.job import read_outcome, read_test_rows

TEST_ROWS = 30


@pytest.fixture
def short(tiny_overrides: list[str]) -> list[str]:
    """Jobs of two steps, with test rows and without plots' worth of evaluations."""
    return [*tiny_overrides, "data.test_fraction=0.1", "train.steps=2", "train.eval_every=0", "tracking=none",
            "train.keep_checkpoints=0"]  # fmt: skip


def sweep_folder(workplace: Path) -> Path:
    [folder] = (workplace / "outputs/sweeps").glob("*/*")
    return folder


def verdict_in(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "verdict.json").read_text())
    return found


def test_a_plain_grid_with_replicates_ends_in_a_verdict(
    cli: Callable[..., Any], short: list[str], workplace: Path
) -> None:
    tracked = [each for each in short if each != "tracking=none"]
    ended = cli("-m", *tracked, "rank=1,4", "optimizer.lr=1e-3,1e-2", "study.tune=[optimizer.lr]", "study.replicates=2")
    assert ended.code == 0, ended.err
    folder = sweep_folder(workplace)
    found = verdict_in(folder)
    assert [set(arm["values"]) for arm in found["arms"]] == [{"0", "1"}] * 2
    assert {arm["tuned"]["optimizer.lr"] for arm in found["arms"]} <= {1e-3, 1e-2}
    assert found["split"] == "test"
    assert len(found["pairs"]) == 1
    assert found["rows"] == found["pairs"][0]["rows"] > 1
    assert ended.out.index("Verdict") < ended.out.index("Sweep, best first")
    assert found["command"].startswith("python -m lora_exp model=hf")
    assert "seed=" not in found["command"]
    assert "class=verdict" in (folder / "report.html").read_text()
    _check_choice(folder, found)
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    [parent] = client.search_runs(["1"], "tags.`lora_exp.kind` = 'sweep'")
    assert parent.data.tags["mlflow.note.content"].startswith(f"**Verdict**\n\n- {found['lines'][0]}")
    assert {"verdict.json", "verdict.md"} <= {file.path for file in client.list_artifacts(parent.info.run_id)}


def _check_choice(folder: Path, found: dict[str, Any]) -> None:
    """Each arm's value is the one that is best in the mean of the validation losses, computed anew."""
    outcomes = [read_outcome(file.parent) for file in folder.glob("*/result.json")]
    for arm in found["arms"]:
        losses: dict[float, list[float]] = {}
        for outcome in outcomes:
            assert outcome is not None
            if f"rank={outcome.values['rank']}" == arm["arm"]:
                losses.setdefault(outcome.values["optimizer.lr"], []).append(outcome.result.eval_loss)  # type: ignore
        means = {value: sum(each) / len(each) for value, each in losses.items()}
        assert arm["tuned"]["optimizer.lr"] == min(means, key=means.__getitem__)


def test_with_one_seed_nothing_can_be_said(cli: Callable[..., Any], short: list[str]) -> None:
    ended = cli("-m", *short, "rank=1,4")
    assert "Nothing can be said: the arms have one seed in common" in ended.out


def test_a_study_tunes_and_confirms_with_fresh_seeds_and_opens_the_test_rows_at_the_end(
    cli: Callable[..., Any], short: list[str], workplace: Path
) -> None:
    ended = cli("-m", *short, "hydra/sweeper=study", "rank=1,4", "optimizer.lr=1e-4,1e-3", "study.tune=[optimizer.lr]",
                "study.tune_replicates=1", "study.replicates=2", "study.widen=1")  # fmt: skip
    assert ended.code == 0, ended.err
    folder = sweep_folder(workplace)
    jobs = sorted((int(file.parent.name), file.parent) for file in folder.glob("*/result.json"))
    outcomes = [(place, outcome) for _, place in jobs if (outcome := read_outcome(place))]
    tuning = [outcome for _, outcome in outcomes if outcome.values.get("train.test") is False]
    confirming = [(place, outcome) for place, outcome in outcomes if "train.test" not in outcome.values]
    assert [outcome.number for _, outcome in outcomes] == list(range(len(tuning) + 4))
    assert {outcome.values["seed"] for outcome in tuning} == {0}
    assert {outcome.values["seed"] for _, outcome in confirming} == {1, 2}
    assert max(each.number for each in tuning) < min(each.number for _, each in confirming)
    assert not any(outcome.result.test for outcome in tuning)  # type: ignore[union-attr]
    assert all(read_test_rows(place) for place, _ in confirming)
    # the same budget for each arm, also where one was best at the edge of its grid
    tried = {rank: sorted(each.values["optimizer.lr"] for each in tuning if each.values["rank"] == rank)  # type: ignore
             for rank in (1, 4)}  # fmt: skip
    assert tried[1] == tried[4]
    assert pytest.approx(1e-2) in tried[1]  # two steps cannot have a rate that is too high
    assert "opened once, after all tuning" in ended.out
    assert "is at the edge of 0.0001…0.01" in ended.out


def test_a_value_that_fails_is_not_chosen_and_the_study_goes_on(
    cli: Callable[..., Any], short: list[str], workplace: Path
) -> None:
    ended = cli("-m", *short, "hydra/sweeper=study", "rank=1,4", "optimizer.lr=-1,1e-3", "study.tune=[optimizer.lr]",
                "study.replicates=2", "study.tune_replicates=1", "study.widen=0")  # fmt: skip
    assert ended.code == 1  # as of any sweep of which a job failed
    found = verdict_in(sweep_folder(workplace))
    assert [arm["tuned"] for arm in found["arms"]] == [{"optimizer.lr": 1e-3}] * 2
    assert [len(arm["values"]) for arm in found["arms"]] == [2, 2]


def test_an_arm_of_which_nothing_could_be_tuned_is_left_out(
    cli: Callable[..., Any], short: list[str], workplace: Path
) -> None:
    ended = cli(
        "-m",
        *short,
        "hydra/sweeper=study",
        "rank=2,4,1000",
        "optimizer.lr=1e-3,1e-2",
        "study.tune=[optimizer.lr]",
        "study.replicates=2",
        "study.tune_replicates=1",
        "study.widen=0",
    )
    assert ended.code == 1
    assert "rank=1000 is left out: no value of optimizer.lr was trained with each seed" in ended.out
    assert len(list(sweep_folder(workplace).glob("*/result.json"))) == 6 + 4
    assert {arm["arm"] for arm in verdict_in(sweep_folder(workplace))["arms"]} == {"rank=2", "rank=4"}


def test_what_a_study_cannot_do_is_said_before_it_begins(cli: Callable[..., Any], short: list[str]) -> None:
    for wrong, said in (
        (["rank=1,4", "seed=0,1", "hydra/sweeper=study"], "a study chooses its own seeds"),
        (["rank=1,4", "seed=0,1", "study.replicates=2"], "leave one out"),
        (["rank=1,4", "study.tune=[optimizer.lr]"], "study.tune=optimizer.lr is not swept"),
        (["rank=1,4", "study.tune=[rank]", "hydra/sweeper=study"], "nothing is compared"),
        (["rank=1,4", "study.margin=-1"], "study.margin"),
        (["rank=1,4", "study.metric=los"], "study.metric"),
    ):
        ended = cli("-m", *short, *wrong)
        assert ended.code == 1, wrong
        assert said in ended.err + ended.out, (wrong, ended.err[-500:])
        assert "Traceback" not in ended.err + ended.out


def test_the_same_seed_gives_every_arm_the_same_rows_in_the_same_order(
    cli: Callable[..., Any], short: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lora_exp.data.kinds.text import Text

    seen: list[list[Any]] = []
    plain = Text.losses

    def losses(self: Any, model: Any, batch: Any) -> Any:
        seen[-1].append((model.training, batch["input_ids"].tolist()))
        return plain(self, model, batch)

    monkeypatch.setattr(Text, "losses", losses)
    for arm in (["rank=1"], ["rank=4", "dropout=0.5"], ["adapter=dora"], ["seed=1"]):
        seen.append([])
        assert cli(*short, *arm).code == 0
    assert seen[0] == seen[1] == seen[2]
    assert [rows for is_training, rows in seen[0] if is_training] != [
        rows for is_training, rows in seen[3] if is_training
    ]
    assert [rows for is_training, rows in seen[0] if not is_training] == [
        rows for is_training, rows in seen[3] if not is_training
    ]


def test_test_rows_add_up_to_the_test_loss(cli: Callable[..., Any], short: list[str], workplace: Path) -> None:
    assert cli(*short).code == 0
    [folder] = (workplace / "outputs/runs").glob("*/*")
    rows, outcome = read_test_rows(folder), read_outcome(folder)
    assert outcome is not None
    assert sum(rows["loss"]) / sum(rows["count"]) == pytest.approx(outcome.result.test["loss"], rel=1e-9)  # type: ignore
