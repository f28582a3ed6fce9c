"""Which run ``best`` is: the best by a metric of a sweep or an experiment, at the best of its kept steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import TrackingConfig
from lora_exp.errors import UserError
from lora_exp.job import RESULT_FILE, Result, read_metrics, read_outcome
from lora_exp.training.metrics import metrics
from lora_exp.use.found import FoundRun, check_tracked, checkpoint_folder, is_saved
from lora_exp.use_config import BestConfig

log = logging.getLogger(__name__)
OUTPUTS = Path("outputs")
_BETTER = ("lower", "higher")


@dataclass(frozen=True)
class _Scored:
    """A run's value of the metric after ``step``, or of what it saved (None)."""

    value: float
    folder: Path
    step: int | None


def find_best(best: BestConfig, tracking: TrackingConfig) -> FoundRun:
    """The best by ``best.metric``; an earlier checkpoint of it, where that is kept and better than what was saved.

    Raises UserError where there is none, or which is better is not known.
    """
    metric, sign = _named(best.metric), _sign(best)
    folders, of = _candidates(best, tracking)
    scored = [each for folder in folders for each in _scored(folder, metric)]
    if not scored:
        raise UserError(f"run=best: no finished training among {of} has {best.metric}: name another best.metric")
    found = min(scored, key=lambda each: (sign * each.value, each.step is not None))
    log.info(f"best   {metric} {found.value:.4f}, of {len({each.folder for each in scored})} runs of {of}")
    _say_if_gone(found, metric, sign)
    return FoundRun((found.folder / "adapter").resolve(), found.folder.resolve(), found.step)


def _named(metric: str) -> str:
    """As records have it: ``loss`` is ``eval/loss``."""
    if metric.startswith("test/"):
        raise UserError(f"best.metric={metric} chooses by test rows, by which nothing is chosen: use eval/… instead")
    return metric if "/" in metric else f"eval/{metric}"


def _sign(best: BestConfig) -> int:
    """1 where lower is better, -1 where higher is."""
    if best.better is not None and best.better not in _BETTER:
        raise UserError(f"best.better={best.better} is not known: choose one of {', '.join(_BETTER)}")
    name, better = best.metric.removeprefix("eval/"), best.better
    if better is None and best.metric.startswith("written/"):
        better = "higher"  # what a model wrote is judged by how much of it is right
    elif better is None and not metrics.problem(name):
        better = metrics[name].better
    if better is None:
        raise UserError(f"best.metric={best.metric} does not say which is better: add best.better=lower or higher")
    return -1 if better == "higher" else 1


def _scored(folder: Path, metric: str) -> Iterator[_Scored]:
    """What the run in ``folder`` saved, and each of its kept checkpoints that was evaluated."""
    outcome = read_outcome(folder)
    if outcome is None or outcome.status != "FINISHED" or not isinstance(outcome.result, Result):
        return
    if not is_saved(folder / "adapter"):
        return
    saved = _saved_value(outcome.result, metric)
    found: list[tuple[float, int | None]] = [(saved, None)] if saved is not None else []
    for record in read_metrics(folder):
        step = int(record["step"])
        if metric in record and step and step != outcome.result.step and checkpoint_folder(folder, step).is_dir():
            found.append((float(record[metric]), step))
    yield from (_Scored(value, folder, step) for value, step in found if math.isfinite(value))


def _saved_value(result: Result, metric: str) -> float | None:
    return result.eval_loss if metric == "eval/loss" else result.metrics.get(metric.partition("/")[2])


def _say_if_gone(found: _Scored, metric: str, sign: int) -> None:
    """A better step of which no checkpoint is kept."""
    records = [each for each in read_metrics(found.folder) if metric in each and each["step"]]
    best = min(records, key=lambda each: sign * each[metric], default=None)
    if best is not None and sign * best[metric] < sign * found.value:
        log.info(
            f"best   step {int(best['step'])} had {best[metric]:.4f}, but its checkpoint is gone: "
            "train.keep=best keeps that adapter"
        )


def _candidates(best: BestConfig, tracking: TrackingConfig) -> tuple[Sequence[Path], str]:
    """The folders that are looked at, and what they are in words."""
    if best.of is None:
        sweep = _newest_sweep()
        return _jobs(sweep), str(sweep)
    if (folder := Path(best.of).expanduser()).is_dir():
        return _jobs(folder), str(folder)
    from lora_exp.tracking import finished

    check_tracked(tracking, f"best.of={best.of}")
    return finished.folders(tracking, best.of), f"MLflow's {best.of}"


def _jobs(folder: Path) -> list[Path]:
    """The folders of a sweep's jobs; or of all jobs below."""
    found = sorted({file.parent for file in folder.glob(f"**/{RESULT_FILE}")})
    if not found:
        raise UserError(f"best.of={folder} holds no job that has ended: name a sweep's folder")
    return found


def _newest_sweep() -> Path:
    """That with the job that ended last, of those that have trained."""
    files = sorted(OUTPUTS.glob(f"sweeps/*/*/*/{RESULT_FILE}"), key=lambda file: -file.stat().st_mtime)
    for file in files:
        if (outcome := read_outcome(file.parent)) is not None and isinstance(outcome.result, Result):
            return file.parents[1]
    runs = sorted((OUTPUTS / "runs").glob(f"*/*/{RESULT_FILE}"), key=lambda file: file.stat().st_mtime)
    hint = f"run={runs[-1].parent}" if runs else "run=FOLDER"
    raise UserError(f"run=best: there is no sweep below ./{OUTPUTS}: name a run ({hint}), or best.of=FOLDER")
