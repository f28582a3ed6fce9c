"""Which adapter a run leaves, what it says of the best one, when it stops, and how it is counted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow.tracking import MlflowClient
from safetensors.torch import load_file
from torch.utils.data import Subset

from lora_exp.data import Data
from lora_exp.job import Outcome, read_metrics, read_outcome

Cli = Callable[..., Any]
# The validation loss of the evaluations: before, and after steps 2, 4, 6, 8 and 10.
COURSE = [9.0, 5.0, 4.0, 4.5, 4.2, 6.0]


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> dict[int, dict[str, torch.Tensor]]:
    """Evaluations find what they are told to; the trained values at each are noted, by optimizer step."""
    from lora_exp.training import loop

    values: dict[int, dict[str, torch.Tensor]] = {}
    real = loop._evaluated

    def told(forward: Any, lane: Any) -> dict[str, Any]:
        record = real(forward, lane)
        record["eval/loss"] = COURSE[len(values)]
        values[record["step"]] = {str(i): p.detach().clone() for i, p in enumerate(lane.parameters)}
        return record

    monkeypatch.setattr(loop, "_evaluated", told)
    return values


@pytest.fixture
def with_test_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validation rows again, as a test split."""
    from lora_exp.packing import resident

    real = resident.load_data

    def load(*given: Any) -> Data:
        data = real(*given)
        rows = Subset(data.validation, range(7))
        return Data(data.train, data.validation, data.rows, data.shape, test=rows)

    monkeypatch.setattr(resident, "load_data", load)


def outcome(folder: Path) -> Outcome:
    """Of the run that finished."""
    found = [read_outcome(file.parent) for file in folder.glob("outputs/**/result.json")]
    (finished,) = [each for each in found if each is not None and each.result is not None]
    return finished


def saved_step(folder: Path, values: Mapping[int, Mapping[str, torch.Tensor]]) -> int:
    """The step whose values are in the run's adapter."""
    file = next(folder.glob("outputs/**/adapter/*.safetensors"))
    stored = sorted(tensor.float().sum().item() for tensor in load_file(file).values())
    fits = [
        step
        for step, those in values.items()
        if stored == pytest.approx(sorted(value.sum().item() for value in those.values()), abs=1e-6)
    ]
    assert len(fits) == 1
    return fits[0]


LONG = ["train.steps=10", "train.eval_every=2", "optimizer.lr=0.01"]


@pytest.mark.parametrize(
    ("wishes", "saved", "best", "last"),
    [
        ([], (10, 6.0), (4, 4.0), 10),
        (["train.keep=last"], (10, 6.0), (4, 4.0), 10),
        (["train.keep=best"], (4, 4.0), (4, 4.0), 10),
        (["train.early_stopping=1"], (4, 4.0), (4, 4.0), 6),
        (["train.early_stopping=2"], (4, 4.0), (4, 4.0), 8),
        (["train.early_stopping=3"], (4, 4.0), (4, 4.0), 10),
        (["train.early_stopping=2", "train.min_delta=1.5"], (4, 4.0), (4, 4.0), 6),
    ],
)  # fmt: skip
def test_what_stays_and_what_is_said(
    cli: Cli, tiny_overrides: list[str], workplace: Path, course: Any,
    wishes: list[str], saved: tuple[int, float], best: tuple[int, float], last: int,
) -> None:  # fmt: skip
    done = cli(*tiny_overrides, *LONG, *wishes, "tracking=none")
    assert done.code == 0, done.err
    found = outcome(workplace).result
    assert (found.step, found.eval_loss) == saved
    assert (found.best_step, found.best_loss) == best
    assert saved_step(workplace, course) == saved[0]
    assert max(course) == last
    assert (f"stopped after {last} of 10 steps" in done.out) == (last < 10)
    assert ("best was validation loss 4.0000 at step 4" in done.out) == (saved != best)
    assert not list(workplace.glob("outputs/**/.best*"))


def test_mlflow_and_the_report_have_the_best(cli: Cli, tiny_overrides: list[str], workplace: Path, course: Any) -> None:
    done = cli(*tiny_overrides, *LONG, "seed=1", "-m")
    assert done.code == 0, done.err
    assert "4.0000 @4" in done.out
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    run = client.get_run(outcome(workplace).result.run_id)
    figures = run.data.metrics
    assert (figures["best/loss"], figures["best/step"], figures["eval/loss"]) == (4.0, 4.0, 6.0)
    assert figures["best/perplexity"] > 1


def test_a_metric_of_which_more_is_better(
    cli: Cli, tiny_overrides: list[str], workplace: Path, course: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "surprise.py").write_text(
        "from lora_exp.training.metrics import metric\n"
        "@metric('negative', better='higher')\ndef negative(sums):\n    return -sums.count - 0.0\n"
        "@metric('unsaid')\ndef unsaid(sums):\n    return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    wishes = ["plugins=[surprise]", "train.metrics=[negative,unsaid]", "train.keep=best", "tracking=none"]
    done = cli(*tiny_overrides, *LONG, *wishes, "train.best_metric=eval/unsaid")
    assert done.code == 1
    assert "unsaid does not say which is better: register it with @metric" in done.err
    done = cli(*tiny_overrides, *LONG, *wishes, "train.best_metric=eval/negative")
    assert done.code == 0, done.err
    assert outcome(workplace).result.step == 2  # all are alike: the first


@pytest.mark.parametrize("keep", ["best", "last"])
def test_test_rows_are_looked_at_once_with_what_is_saved(
    cli: Cli, tiny_overrides: list[str], workplace: Path, course: Any, with_test_rows: None, keep: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from lora_exp import run

    seen: list[dict[str, torch.Tensor]] = []
    real = run.evaluate

    def evaluate(forward: Any, batches: list[Any], *more: Any) -> dict[str, float]:
        trained = [each for each in forward.model.parameters() if each.requires_grad]
        seen.append({str(i): value.detach().clone() for i, value in enumerate(trained)})
        assert sum(len(batch["labels"]) for batch in batches) == 7
        return real(forward, batches, *more)

    monkeypatch.setattr(run, "evaluate", evaluate)
    done = cli(*tiny_overrides, *LONG, f"train.keep={keep}")
    assert done.code == 0, done.err
    step = 4 if keep == "best" else 10
    (here,) = seen
    assert all(torch.equal(here[name], value) for name, value in course[step].items())
    found = outcome(workplace).result
    assert found.test["loss"] > 0
    assert f"test loss {found.test['loss']:.2f}" in done.out
    records = read_metrics(next(workplace.glob("outputs/**/metrics.jsonl")).parent)
    assert [(record["step"], record["test/loss"]) for record in records if "test/loss" in record] == [
        (step, found.test["loss"])
    ]
    client = MlflowClient(f"sqlite:///{workplace}/outputs/mlflow.db")
    assert client.get_run(found.run_id).data.metrics["test/loss"] == found.test["loss"]
    kept = [load_file(file) for file in workplace.glob("outputs/**/.best.safetensors")]  # for who resumes it
    assert len(kept) == (keep == "best")
    assert all(torch.equal(values[name], value) for values in kept for name, value in course[step].items())


def test_epochs_give_the_steps(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    others = [each for each in tiny_overrides if not each.startswith(("train.steps", "train.warmup", "train.eval_e"))]
    done = cli(*others, "train.epochs=1.5", "train.micro_batch_size=7", "train.grad_accum_steps=3", "tracking=none",
               "train.eval_every='0.5 epoch'", "train.log_every='1 epoch'", "train.warmup_ratio=0.1")  # fmt: skip
    assert done.code == 0, done.err
    records = read_metrics(next(workplace.glob("outputs/**/metrics.jsonl")).parent)
    rows = int(done.out.partition(" training and ")[0].rpartition(" ")[2].replace(",", ""))
    epoch = math.ceil(math.ceil(rows / 7) / 3)
    steps = math.ceil(1.5 * epoch)
    assert f"{steps} optimizer steps of 3 × 7 rows (" in done.out
    assert records[-1]["step"] == outcome(workplace).result.step == steps
    logged = [record for record in records if "train/loss" in record]
    assert [(record["step"], record["train/epoch"]) for record in logged] == [(epoch, 1.0), (steps, steps / epoch)]
    half = math.ceil(epoch / 2)
    assert [record["step"] for record in records if "eval/loss" in record] == [0, half, epoch, steps]


@pytest.mark.parametrize(
    ("wishes", "says"),
    [
        (["train.epochs=2"], "train.steps=4 and train.epochs=2 are two lengths of one training: take one out"),
        (["train.epochs=0", "train.steps=null"], "train.epochs=0 must be a finite number above 0"),
        (["train.warmup_ratio=0.1"], "train.warmup_steps=1 and train.warmup_ratio=0.1 are two warm-ups"),
        (["train.warmup_steps=null", "train.warmup_ratio=3"], "train.warmup_ratio=3 is outside [0, 1]"),
        (["train.eval_every=often"], "train.eval_every=often is no interval"),
        (["train.save_every=-2"], "train.save_every=-2 is no interval"),
        (["train.best_metric=eval/acuracy"], "eval/acuracy is not evaluated: choose one of eval/loss"),
        (["train.keep=first"], "train.keep=first is not known"),
        (["train.early_stopping=2", "train.keep=last"], "would keep what training ended for"),
        (["train.early_stopping=0"], "train.early_stopping=0 is below 1"),
        (["train.early_stopping=2", "train.eval_every=0"], "of which train.eval_every=0 leaves none"),
        (["train.min_delta=-1"], "train.min_delta=-1 is below 0"),
        (["train.schedule=polynomial", "train.schedule_options={end: 1}"], "end is no option of train.sched"),
        (["train.steps=many"], "train.steps=many is not a whole number: such as train.steps=24"),
    ],
)  # fmt: skip
def test_a_wish_that_cannot_be_is_one_clear_error(
    cli: Cli, tiny_overrides: list[str], wishes: list[str], says: str
) -> None:
    done = cli(*tiny_overrides, *wishes)
    assert done.code == 1
    assert says in done.err
    assert "Traceback" not in done.err


def test_all_of_them_are_reported_together(cli: Cli, tiny_overrides: list[str]) -> None:
    wrong = ["train.epochs=2", "train.keep=first", "train.log_every=now", "train.schedule=coseno", "rank=0"]
    done = cli(*tiny_overrides, *wrong)
    assert "The config has 5 problems" in done.err


def test_more_warm_up_than_epochs_give_steps_is_said_before_the_base_is_loaded(
    cli: Cli, tiny_overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lora_exp.models.load_base", lambda *_: pytest.fail("loaded"))
    done = cli(*tiny_overrides, "train.steps=null", "train.epochs=0.01", "train.warmup_steps=9", "tracking=none")
    assert done.code == 1
    assert "train.warmup_steps=9 is outside [0, 2], the optimizer steps of this training" in done.err


def test_neither_evaluation_nor_log_in_between(cli: Cli, tiny_overrides: list[str], workplace: Path) -> None:
    done = cli(*tiny_overrides, "train.eval_every=0", "train.log_every=null", "tracking=none")
    assert done.code == 0, done.err
    lines = next(workplace.glob("outputs/**/metrics.jsonl")).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 4, 4]
