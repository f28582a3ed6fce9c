"""``hydra/launcher=packed`` against Hydra's own launcher: what jobs leave, what is done once, and how they end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from lora_exp import models
from lora_exp.job import read_metrics, read_outcome
from lora_exp.packing import measuring, resident
from lora_exp.sweep.state import read_launched
from lora_exp.training import loop

CLOCK = ("_per_s", "train/mfu")
PACKED = "hydra/launcher=packed"
JOINED = [PACKED, "hydra.launcher.lanes=8", "hydra.launcher.passes=joined"]
# A rank of 1000 is a UserError once the model is there. Each sweep is to do the work again.
SWEPT = ["rank=2,1000,4", "adapter=lora,dora", "dropout=0.3", "sweep.reuse=false"]
WITHIN = {"train/loss": 1e-5, "train/grad_norm": 1e-5, "train/lr": 0.0, "eval/loss": 1e-6}
GOOD, BAD = (0, 1, 4, 5), (2, 3)


def earned(folder: Path) -> tuple[dict[str, bytes], list[dict[str, float]]]:
    """The adapter's files, and all that was recorded but what the clock says."""
    records = [
        {name: value for name, value in record.items() if not name.endswith(CLOCK)} for record in read_metrics(folder)
    ]
    return {file.name: file.read_bytes() for file in sorted((folder / "adapter").glob("*.safetensors"))}, records


def status(folder: Path) -> str:
    outcome = read_outcome(folder)
    assert outcome is not None
    return outcome.status


def children(folder: Path, sweep: str) -> list[str]:
    """The statuses of the runs of one sweep's jobs, by job number."""
    client = MlflowClient(f"sqlite:///{folder}/outputs/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("lora_exp").experiment_id])
    own = [run for run in runs if Path(run.data.tags.get("folder", "")).parent == folder / sweep]
    return [run.info.status for run in sorted(own, key=lambda run: int(Path(run.data.tags["folder"]).name))]


def test_jobs_leave_what_they_leave_alone(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = Counter[str]()

    def counted(where: Any, name: str) -> None:
        real = getattr(where, name)
        monkeypatch.setattr(where, name, lambda *args, **named: (done.update([name]), real(*args, **named))[1])

    for where, name in ((models, "load_base"), (models, "base_files_sha256"), (resident, "load_data")):
        counted(where, name)
    counted(loop, "evaluate")
    cli("-m", *tiny_overrides, *SWEPT, "hydra.sweep.dir=basic")
    alone = Counter(done)
    ended = cli("-m", *tiny_overrides, *SWEPT, "hydra.sweep.dir=packed", PACKED, "hydra.launcher.lanes=1")
    assert ended.code == 1
    assert "rank=1000 is above the dimensions" in ended.out
    launched = read_launched(workplace / "packed")  # what the display and task=status go by
    assert launched is not None
    assert (launched.total, sorted(launched.jobs)) == (6, list(range(6)))
    assert (alone["load_base"], alone["base_files_sha256"], alone["load_data"]) == (6, 6, 6)
    once = done - alone
    assert (once["load_base"], once["base_files_sha256"], once["load_data"]) == (1, 1, 1)
    assert alone["evaluate"] - once["evaluate"] == 1  # of two jobs that begin as the base does; DoRA looks for itself
    cli("-m", *tiny_overrides, *SWEPT, "hydra.sweep.dir=joined", *JOINED)
    for number in GOOD:
        files, records = earned(workplace / "basic" / str(number))
        assert earned(workplace / "packed" / str(number)) == (files, records)
        close = earned(workplace / "joined" / str(number))[1]
        for mine, theirs in zip(close, records, strict=True):
            assert mine.keys() == theirs.keys()
            for name in theirs.keys() & WITHIN.keys():
                assert mine[name] == pytest.approx(theirs[name], abs=WITHIN[name], rel=0)
    for sweep in ("basic", "packed", "joined"):
        assert [status(workplace / sweep / str(number)) for number in BAD] == ["FAILED", "FAILED"]
        assert children(workplace, sweep) == ["FINISHED", "FINISHED", "FAILED", "FAILED", "FINISHED", "FINISHED"]
    for number in GOOD:
        said = (workplace / "joined" / str(number) / "lora_exp.log").read_text()
        assert said.count("Initial Parameters") == said.count("hashes adapter_sha256") == 1


@pytest.mark.parametrize(
    ("swept", "once"),
    [
        (["rank=2,4", r"targets='.*layers\.1\..*_proj'"], True),
        (["rank=2,4"], False),
        (["rank=2", "seed=0,1", r"targets='.*layers\.1\..*_proj'"], False),
        (["rank=2,4", r"targets='.*layers\.[01]\..*_proj'"], False),
    ],
)
def test_jobs_whose_adapters_lie_high_share_what_is_below_however_long_their_rows_are(
    cli: Callable[..., Any],
    tiny_overrides: list[str],
    workplace: Path,
    monkeypatch: pytest.MonkeyPatch,
    swept: list[str],
    once: bool,
) -> None:
    monkeypatch.setattr(measuring, "_TOKENS", {"cpu": 1})
    monkeypatch.setattr(measuring, "_timed", lambda asked, count, *_: 1.0 if count == 1 else 0.5 * count)
    given = [*tiny_overrides, *swept, "sweep.reuse=false", "hydra.sweep.dir=packed", PACKED]
    ended = cli("-m", *given)
    assert ended.code == 0
    assert ("lanes  the same rows go once through the lowest 1 of 2 layers" in ended.out) == once
    assert ("2 share a pass" in ended.out) == once
    cli("-m", *given[:-2], "hydra.sweep.dir=alone")
    for number in (0, 1):
        records, alone = (earned(workplace / sweep / str(number))[1] for sweep in ("packed", "alone"))
        assert [record.keys() for record in records] == [record.keys() for record in alone]
        for mine, theirs in zip(records, alone, strict=True):
            within = {name: pytest.approx(theirs[name], abs=WITHIN[name]) for name in theirs.keys() & WITHIN.keys()}
            assert {name: mine[name] for name in within} == within


@pytest.mark.parametrize("wish", ["lanes=0", "lanes=many", "passes=sometimes", "products=some"])
def test_a_wish_that_is_none_is_refused(cli: Callable[..., Any], tiny_overrides: list[str], wish: str) -> None:
    ended = cli("-m", *tiny_overrides, PACKED, f"hydra.launcher.{wish}")
    assert ended.code == 1
    assert f"hydra.launcher.{wish}" in ended.err
