"""What a sweep's figures show, as data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import SWEPT_FILE, read_swept
from lora_exp.sweep.axes import Axis, axis_of
from lora_exp.sweep.figures import MOST_SERIES, Figure, Point, Series
from lora_exp.sweep.jobs import collect, differing, factors
from lora_exp.sweep.parallel import Parallel
from lora_exp.sweep.report import figures_of


def drawn(folder: Path) -> tuple[dict[str, Figure], dict[str, Parallel]]:
    jobs = collect(folder)
    figures, parallels = figures_of(jobs, factors(jobs, differing(jobs), read_swept(folder)))
    return {each.name: each for each in figures}, {each.name: each for each in parallels}


def shape(figure: Figure) -> dict[str, list[float | str]]:
    return {series.label: [point.x for point in series.points] for series in figure.series}


def test_an_lr_sweep_is_drawn_against_lr_and_nothing_else(tmp_path: Path, made_up: Any) -> None:
    rates = [1e-4, 1e-3, 1e-2]
    figures, _ = drawn(made_up.sweep(tmp_path, swept={"optimizer.lr": rates}))
    assert set(figures) == {"loss_curves", "loss_against_optimizer.lr", "loss_against_time"}
    figure = figures["loss_against_optimizer.lr"]
    assert (figure.x.is_log, figure.x.ticks, shape(figure)) == (True, rates, {"": rates})
    assert [point.y for point in figure.series[0].points] == [
        pytest.approx(made_up.loss_of({"optimizer.lr": rate})) for rate in rates
    ]


def test_two_values_give_a_line_for_each_of_the_other(tmp_path: Path, made_up: Any) -> None:
    figures, parallels = drawn(made_up.sweep(tmp_path, swept={"rank": [4, 8], "alpha": [8.0, 32.0]}))
    assert shape(figures["loss_against_rank"]) == {"alpha=8": [4, 8], "alpha=32": [4, 8]}
    assert shape(figures["loss_against_alpha"]) == {"rank=4": [8, 32], "rank=8": [8, 32]}
    assert not parallels


def test_replicates_are_a_mean_between_the_lowest_and_the_highest(tmp_path: Path, made_up: Any) -> None:
    swept = {"rank": [4, 8], "adapter": ["lora", "dora"], "seed": [0, 1, 2]}
    figures, _ = drawn(made_up.sweep(tmp_path, swept=swept, accuracy=True))
    assert "loss_against_seed" not in figures
    figure = figures["loss_against_rank"]
    assert shape(figure) == {"adapter=dora": [4, 8], "adapter=lora": [4, 8]}
    values = [made_up.loss_of({"rank": 4, "adapter": "dora", "seed": seed}) for seed in range(3)]
    point = figure.series[0].points[0]
    assert (point.low, point.y, point.high) == (min(values), pytest.approx(sum(values) / 3), max(values))
    assert "lowest to the highest" in figure.note
    assert len(figures["loss_curves"].series) == 4
    assert figures["loss_against_adapter"].x.categories == ["lora", "dora"]
    assert {"accuracy_curves", "accuracy_against_rank", "accuracy_against_parameters"} <= set(figures)
    assert figures["accuracy_curves"].series[0].points[-1].y > figures["accuracy_curves"].series[0].points[0].y


def test_seeds_alone_are_points_without_a_line(tmp_path: Path, made_up: Any) -> None:
    figures, _ = drawn(made_up.sweep(tmp_path, swept={"seed": [10, 9]}))
    figure = figures["loss_against_seed"]
    assert figure.x.categories == ["9", "10"]
    assert not figure.series[0].joined


def test_categories_alone_are_points_without_a_line(tmp_path: Path, made_up: Any) -> None:
    figures, _ = drawn(made_up.sweep(tmp_path, swept={"adapter": ["lora", "dora", "vera"]}))
    (series,) = figures["loss_against_adapter"].series
    assert (series.joined, [point.x for point in series.points]) == (False, ["lora", "dora", "vera"])


def test_values_drawn_at_random_are_not_joined(tmp_path: Path, made_up: Any) -> None:
    for number in range(12):
        values = {"optimizer.lr": 10 ** -(1 + number / 3), "dropout": (number * 7 % 12) / 40}
        made_up.job(tmp_path, number, values)
    (tmp_path / SWEPT_FILE).write_text('["optimizer.lr", "dropout"]')
    figures, _ = drawn(tmp_path)
    (series,) = figures["loss_against_optimizer.lr"].series
    assert (series.joined, len(series.points)) == (False, 12)
    assert "dropout differ" in figures["loss_against_optimizer.lr"].note


def test_what_failed_is_counted_and_its_curve_is_kept(tmp_path: Path, made_up: Any) -> None:
    figures, _ = drawn(made_up.sweep(tmp_path, swept={"rank": [2, 4, 8, 16]}, failing=(3,)))
    assert "1 job without a result" in figures["loss_against_rank"].note
    assert shape(figures["loss_against_rank"]) == {"": [2, 4, 8]}
    assert shape(figures["loss_curves"])["rank=16 (FAILED)"] == [0, 12]


def test_a_value_that_follows_from_another_is_not_drawn(tmp_path: Path, made_up: Any) -> None:
    for number, rank in enumerate((4, 8, 16)):
        made_up.job(tmp_path, number, {"rank": rank, "alpha": 2.0 * rank})
    assert {"loss_against_rank"} == {name for name in drawn(tmp_path)[0] if name.endswith(("rank", "alpha"))}


@pytest.mark.parametrize(
    ("swept", "expected"),
    [(["train"], ["train.steps"]), (["rank", "train"], ["rank", "train.steps"]), (["experiment"], ["rank"])],
)
def test_a_chosen_file_stands_for_what_it_changes(
    tmp_path: Path, swept: list[str], expected: list[str], made_up: Any
) -> None:
    for number, (rank, steps) in enumerate(
        [(4, 10), (4, 20), (8, 10), (8, 20)] if "train" in swept else [(4, 1), (8, 2)]
    ):
        made_up.job(tmp_path, number, {"rank": rank, "train.steps": steps, "train.warmup_steps": steps // 10})
    jobs = collect(tmp_path)
    assert factors(jobs, differing(jobs), swept) == expected


def test_the_front_is_what_no_job_betters_in_both(tmp_path: Path, made_up: Any) -> None:
    swept = {"rank": [4, 8, 16], "adapter": ["lora", "dora"]}
    for name, figure in drawn(made_up.sweep(tmp_path, swept=swept, accuracy=True))[0].items():
        if not figure.front:
            continue
        sign = -1 if name.startswith("accuracy") else 1
        points = [point for series in figure.series for point in series.points]
        expected = [
            one for one in points
            if not any(
                other.x <= one.x and sign * other.y <= sign * one.y and (other.x, other.y) != (one.x, one.y)
                for other in points
            )
        ]  # fmt: skip
        assert {point.note for point in figure.front} == {point.note for point in expected}, name


def test_more_lines_than_a_legend_holds_leave_the_best_their_names(tmp_path: Path, made_up: Any) -> None:
    figures, _ = drawn(
        made_up.sweep(tmp_path, swept={"rank": [1, 2, 4, 8, 16, 32], "dropout": [0.0, 0.1, 0.2, 0.3, 0.4]})
    )
    named = [series for series in figures["loss_curves"].series if not series.muted]
    assert len(named) == MOST_SERIES // 2
    assert all("rank=32" in series.label or "rank=16" in series.label or "rank=8" in series.label for series in named)
    assert {series.label for series in figures["loss_curves"].series if series.muted} == {"18 others"}


def test_three_swept_values_have_parallel_coordinates(tmp_path: Path, made_up: Any) -> None:
    swept = {"rank": [4, 8], "adapter": ["lora", "dora"], "optimizer.lr": [1e-4, 1e-3]}
    _, parallels = drawn(made_up.sweep(tmp_path, swept=swept, failing=(0,)))
    dimensions = parallels["loss_parallel"].dimensions
    assert [dimension.label for dimension in dimensions] == [*swept, "validation loss"]
    assert {len(dimension.positions) for dimension in dimensions} == {7}
    assert dimensions[1].ticks == {0.0: "dora", 1.0: "lora"}
    assert dimensions[2].ticks == {-4.0: "0.0001", -3.0: "0.001"}


def test_a_sweep_of_plans_is_drawn_by_its_memory(tmp_path: Path, made_up: Any) -> None:
    figures, _ = drawn(made_up.plans(tmp_path, [4, 8, 16]))
    assert set(figures) == {"memory_against_rank", "memory_against_parameters"}
    assert figures["memory_against_rank"].y.label == "planned memory (GiB)"


def test_one_job_is_its_curve(tmp_path: Path, made_up: Any) -> None:
    assert set(drawn(made_up.sweep(tmp_path, swept={"rank": [8]}))[0]) == {"loss_curves"}


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([1e-4, 1e-3], True), ([4, 8, 16], True), ([8, 16], False), ([0.0, 1e-3, 1.0], False), ([1, 2, 3], False),
        ([0.02, 0.08, 0.14, 0.2, 0.26, 0.3], False), ([1e-5, 1e-4, 3e-4, 1e-3, 1e-1], True), ([5, 5], False),
    ],
)  # fmt: skip
def test_logarithms_are_for_values_over_decades(values: list[float], is_log: bool) -> None:
    assert axis_of(values, "x").is_log is is_log


def seen(*values: float) -> Figure:
    points = [Point(float(place), value) for place, value in enumerate(values)]
    return Figure("loss", "loss", axis_of([point.x for point in points], "x"), Axis("loss"), [Series("", points)])


def test_a_loss_far_out_does_not_squeeze_the_others() -> None:
    figure = seen(3.3, 3.4, 3.5, 3.35, 3.45, 3.6, 3.42, 3.47, 3.55, 3.38, 10.8, 4.9)
    assert figure.frame is not None
    low, high = figure.frame
    assert low < 3.3
    assert 3.6 < high < 4.9
    assert figure.told == "beyond the frame: 4.9, 10.8"


@pytest.mark.parametrize(
    "values", [[3.3, 9.0], [3.0] * 7, [3.0] * 6 + [9.0], [3, 4, 5, 6, 7, 8, 9], [3, 3.2, 3.1, 4, 3.9, 4.1, 6]]
)
def test_what_is_not_far_out_is_shown(values: list[float]) -> None:
    assert seen(*values).frame is None
    assert seen(*values).told == ""
