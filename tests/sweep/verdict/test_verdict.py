"""What is compared, chosen and said, over sweeps that nobody ran."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_exp.config import ConfigError, StudyConfig
from lora_exp.job import Outcome, Result, read_outcome, write_outcome, write_test_rows
from lora_exp.sweep.jobs import collect, differing, factors
from lora_exp.sweep.study import Study, beyond
from lora_exp.sweep.verdict.verdict import Verdict, verdict_of
from lora_exp.sweep.verdict.wording import lines

TUNED = StudyConfig(tune=["optimizer.lr"])


def verdict(folder: Path, study: StudyConfig, swept: list[str]) -> Verdict | None:
    jobs = collect(folder)
    return verdict_of(jobs, factors(jobs, differing(jobs, swept), swept), study)


def job(folder: Path, number: int, loss: float | None, test: float | None = None, **values: Any) -> Path:
    place = folder / str(number)
    place.mkdir(parents=True)
    every = {"seed": 0, "rank": 8, "train.micro_batch_size": 4, "data.block_size": 64, **values}
    tested = {} if test is None else {"loss": test}
    result = Result(loss or 0, 4.0, {}, 1000 * every["rank"], 10**6, 4096, 0.5, 12.0, "adapter", None, step=6,
                    test=tested, data_fingerprint="same")  # fmt: skip
    overrides = [f"{key}={value}" for key, value in values.items()]
    status = "FAILED" if loss is None else "FINISHED"
    write_outcome(place, Outcome(number, status, overrides, every, None if loss is None else result))
    return place


def test_each_arm_gets_the_value_that_is_best_by_validation_not_by_test(tmp_path: Path) -> None:
    numbers = itertools.count()
    for rank, lr, seed in itertools.product((4, 8), (1e-4, 1e-3, 1e-2), (0, 1, 2)):
        loss = abs(lr - (1e-3 if rank == 4 else 1e-2)) + 0.001 * seed
        job(tmp_path, next(numbers), loss, 5 - loss + rank + 0.01 * (seed * rank % 3), rank=rank, seed=seed,
            **{"optimizer.lr": lr})  # fmt: skip
    found = verdict(tmp_path, TUNED, ["rank", "optimizer.lr", "seed"])
    assert found is not None
    assert {arm.label: arm.tuned["optimizer.lr"] for arm in found.arms} == {"rank=4": 1e-3, "rank=8": 1e-2}
    assert found.measured.split == "test"
    assert [len(sample.replicates) for sample in found.samples] == [3, 3]
    said = lines(found)
    assert said[0].startswith("rank=4 is better than rank=8 by 4.0")
    assert "rank=8: its best optimizer.lr=0.01 is at the edge of 0.0001…0.01: widen it" in said
    assert found.command == "python -m lora_exp rank=4 optimizer.lr=0.001"
    assert (found.costs[0].trainable, found.costs[0].tokens, found.costs[0].unit) == (4000, 6 * 4 * 64, "tokens")


def test_a_value_of_which_a_seed_failed_is_not_chosen(tmp_path: Path) -> None:
    numbers = itertools.count()
    for rank, lr, seed in itertools.product((4, 8), (1e-3, 1e-1), (0, 1)):
        fails = rank == 8 and lr == 1e-1 and seed == 1
        job(tmp_path, next(numbers), None if fails else 3 - lr + 0.1 * seed, rank=rank, seed=seed,
            **{"optimizer.lr": lr})  # fmt: skip
    found = verdict(tmp_path, TUNED, ["rank", "optimizer.lr", "seed"])
    assert found is not None
    assert {arm.label: arm.tuned["optimizer.lr"] for arm in found.arms} == {"rank=4": 1e-1, "rank=8": 1e-3}


def test_one_seed_says_nothing(tmp_path: Path) -> None:
    for number, rank in enumerate((4, 8)):
        job(tmp_path, number, 3.0 - rank / 100, rank=rank)
    found = verdict(tmp_path, StudyConfig(), ["rank"])
    assert found is not None
    assert lines(found) == [
        "Nothing can be said: the arms have one seed in common or none. rank=8 came out lowest (2.9200), which another "
        "seed may turn round: study.replicates=5 trains each arm with five"
    ]


def test_there_is_no_verdict_without_arms(tmp_path: Path, made_up: Any) -> None:
    made_up.sweep(tmp_path / "seeds", swept={"seed": [0, 1, 2]})
    assert verdict(tmp_path / "seeds", StudyConfig(), ["seed"]) is None
    made_up.plans(tmp_path / "plans", [4, 8])
    assert verdict(tmp_path / "plans", StudyConfig(), ["rank"]) is None
    made_up.sweep(tmp_path / "failed", swept={"rank": [4, 8]}, failing=(0, 1))
    assert verdict(tmp_path / "failed", StudyConfig(), ["rank"]) is None


def test_accuracy_is_better_when_it_is_higher(tmp_path: Path, made_up: Any) -> None:
    made_up.sweep(tmp_path, swept={"rank": [4, 64], "seed": [0, 1, 2]}, accuracy=True)
    found = verdict(tmp_path, StudyConfig(metric="accuracy"), ["rank", "seed"])
    assert found is not None
    assert found.arms[0].label == "rank=64"
    assert found.judgements[0].first == "rank=64"
    assert found.samples[0].mean > found.samples[1].mean


def test_of_alike_arms_the_smallest_is_recommended(tmp_path: Path) -> None:
    numbers = itertools.count()
    for rank, seed in itertools.product((8, 4, 16, 2), (0, 1, 2)):
        job(tmp_path, next(numbers), (3.5 if rank == 2 else 3.0 - 1e-5 * rank) + 0.1 * seed + 1e-6 * (seed * rank % 5),
            rank=rank, seed=seed)  # fmt: skip
    found = verdict(tmp_path, StudyConfig(), ["rank", "seed"])
    assert found is not None
    assert found.arms[0].label == "rank=16"
    assert found.arms[found.recommended].label == "rank=4"
    assert any("rank=16 and rank=4 are indistinguishable within 0.01" in line for line in lines(found))
    assert any("fewest parameters of those indistinguishable from rank=16" in line for line in lines(found))
    assert any("data.test_fraction" in line for line in lines(found))


def test_of_many_arms_the_pairs_with_the_best_are_told(tmp_path: Path, made_up: Any) -> None:
    made_up.sweep(tmp_path, swept={"rank": [2, 4, 8, 16, 32, 64], "seed": [0, 1]})
    found = verdict(tmp_path, StudyConfig(), ["rank", "seed"])
    assert found is not None
    assert len(found.judgements) == 15
    told = [line for line in lines(found) if line.startswith("rank=")]
    assert len(told) == 5
    assert all("rank=64" in line for line in told)


def test_rows_count_only_where_they_are_the_same_and_add_up(tmp_path: Path) -> None:
    for number, (rank, seed) in enumerate(itertools.product((4, 8), (0, 1))):
        losses = [(1.0 + 0.01 * rank * (row + 1) + 0.1 * seed) * count for row, count in enumerate((63, 60, 63))]
        place = job(tmp_path, number, 3.0, sum(losses) / 186, rank=rank, seed=seed)
        write_test_rows(place, [{"loss": losses[:2], "count": [63, 60]}, {"loss": losses[2:], "count": [63]}])
    found = verdict(tmp_path, StudyConfig(), ["rank", "seed"])
    assert found is not None
    assert (found.measured.rows, found.judgements[0].effect.rows) == (3, 3)
    outcome = read_outcome(place)
    assert outcome is not None
    assert isinstance(outcome.result, Result)
    write_outcome(place, replace(outcome, result=replace(outcome.result, data_fingerprint="other")))
    found = verdict(tmp_path, StudyConfig(), ["rank", "seed"])
    assert found is not None
    assert found.judgements[0].effect.rows == 0
    assert any("different rows" in line for line in lines(found))


@pytest.mark.parametrize(
    ("values", "best", "more"),
    [
        (["1e-4", "1e-3", "1e-2"], ["1e-3"], []),
        (["1e-4", "1e-3", "1e-2"], ["1e-2"], ["0.1"]),
        (["1e-4", "3e-4"], ["1e-4", "3e-4"], ["3.333e-05", "0.0009"]),
        (["1", "2", "4"], ["1", "4"], ["8"]),  # a half of a whole number's grid is none
        (["0", "0.1", "0.2"], ["0.2"], ["0.3"]),
        (["0", "0.1"], ["0"], []),
        (["1e-3"], ["1e-3"], []),
        (["lora", "dora"], ["lora"], []),
    ],
)
def test_a_grid_goes_on_in_its_own_steps(values: list[str], best: list[str], more: list[str]) -> None:
    assert beyond(values, best) == more


def test_a_study_goes_on_from_what_it_found(tmp_path: Path) -> None:
    """Its jobs are made up as they are launched: rank 4 is best at 1e-3, rank 8 at the upper edge, then beyond it."""
    launched: list[list[str]] = []

    def launch(jobs: Any) -> None:
        for each in jobs:
            given = dict(item.split("=") for item in each)
            best = {"4": 1e-3, "8": 1e-1}[given["rank"]]
            job(tmp_path, len(launched), abs(float(given["optimizer.lr"]) - best), rank=int(given["rank"]))
            launched.append(list(each))

    section = StudyConfig(tune=["optimizer.lr"], tune_replicates=1, replicates=2)
    swept = {"rank": ["4", "8"], "optimizer.lr": ["1e-4", "1e-3", "1e-2"]}
    Study(section, swept, ("data=text",), 7, tmp_path).run(launch)
    tuning = [each for each in launched if each[-1] == "train.test=false"]
    assert len(tuning) == 2 * 3 + 2 + 2  # 0.1 for both arms, where rank 8 is at the edge again: 1
    assert {each[-2] for each in tuning} == {"seed=7"}
    assert launched[-4:] == [
        ["data=text", f"rank={rank}", f"optimizer.lr={lr}", f"seed={seed}", "train.test=true"]
        for rank, lr in (("4", "1e-3"), ("8", "0.1")) for seed in (8, 9)
    ]  # fmt: skip


def test_a_study_says_all_that_it_lacks_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Study(StudyConfig(tune=["optimizer.lr"]), {"seed": ["0", "1"]}, (), 0, tmp_path)
    assert len(error.value.problems) == 3


def test_the_json_has_what_the_lines_rest_on(tmp_path: Path, made_up: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from lora_exp.sweep.report import report_sweep

    folder = made_up.sweep(tmp_path, swept={"rank": [4, 8, 16], "seed": [0, 1, 2]})
    (folder / "study.json").write_text(json.dumps({"margin": 0.5}))
    report_sweep(folder, interrupted=False)
    found = json.loads((folder / "verdict.json").read_text())
    assert found["margin"] == 0.5
    assert found["lines"][0] in (folder / "verdict.md").read_text()
    printed = capsys.readouterr().out
    assert printed.index(found["lines"][0]) < printed.index("Sweep, best first")
    page = (folder / "report.html").read_text()
    assert page.index("<section class=verdict>") < page.index("<th>job</th>")
