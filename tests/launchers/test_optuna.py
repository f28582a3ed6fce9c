"""hydra/sweeper=optuna, as +experiment=lr_search asks it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_exp.job import Result, read_outcome

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:optuna")
GRID = [10 ** (-5 + 5 * place / 9) for place in range(10)]


def losses(sweep: Path) -> tuple[float, list[float]]:
    """The loss before training, and each job's after."""
    found = [read_outcome(folder) for folder in sorted(sweep.glob("[0-9]*"))]
    results = [each.result for each in found if each is not None and isinstance(each.result, Result)]
    return results[0].eval_loss_before, [result.eval_loss for result in results]


@pytest.mark.slow
def test_a_search_needs_half_the_jobs_of_a_grid(
    cli: Callable[..., Any], tiny_overrides: list[str], workplace: Path
) -> None:
    """Within a tenth of the best grid value's loss; of a loss that falls little, also within a fifth of its gain."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper", reason="pip install 'lora_exp[optuna]'")
    fixed = [*tiny_overrides, "tracking=none", "train.steps=24", "train.eval_every=24", "plan.check=false"]
    grid = ",".join(f"{rate:.3g}" for rate in GRID)
    assert cli("-m", *fixed, f"optimizer.lr={grid}", "hydra.sweep.dir=grid").code == 0
    searched = ["+experiment=lr_search", "optimizer.lr=tag(log,interval(1e-5,1))", "hydra.sweeper.n_trials=5"]
    found = cli("-m", *fixed, *searched, "hydra.sweep.dir=search")
    assert found.code == 0, found.err
    (before, by_grid), (_, by_search) = losses(workplace / "grid"), losses(workplace / "search")
    assert (len(by_grid), len(by_search)) == (10, 5)
    assert min(by_search) <= 1.1 * min(by_grid)
    assert before - min(by_search) >= 0.8 * (before - min(by_grid))
    assert f"Best value: {min(by_search)}" in found.out


@pytest.mark.parametrize(
    ("group", "extra"),
    [("launcher=joblib", "joblib"), ("launcher=submitit_slurm", "submitit"), ("sweeper=optuna", "optuna")],
)
def test_a_choice_that_an_extra_brings_names_it(group: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from hydra.errors import MissingConfigException

    from lora_exp import composing

    monkeypatch.setattr(composing, "_extras", lambda: ["peft", "joblib", "submitit", "optuna"])
    name, _, choice = group.partition("=")
    error = MissingConfigException("not found", f"hydra/{name}/{choice}", ["basic"])
    said = composing.explain(error)
    assert said == f"hydra/{group} is not a choice: pip install 'lora_exp[{extra}]' brings it"
