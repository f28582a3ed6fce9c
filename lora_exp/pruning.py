"""Jobs of a sweep that end early because others do better, as one of Optuna's pruners judges.

It sees the jobs' own evaluations, which lie in the sweep's folder: whichever sweeper chose the jobs, and in whichever
process they run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from lora_exp.adapters.files.whole import write_text
from lora_exp.config import Config, PruneConfig
from lora_exp.errors import UserError
from lora_exp.job import Job, job_folders, read_begun, read_metrics, read_outcome
from lora_exp.keys import unknown_key
from lora_exp.training.best import Best

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)
_FILE = "pruned.json"


@dataclass(frozen=True)
class Rival:
    """A job of the sweep as a pruner sees it: what it was told, and its evaluations by optimizer step.

    ``survives``: whether it was not cut and did not fail. ``has_ended``: whether all its evaluations are there.
    """

    number: int
    told: Mapping[str, str]
    evaluations: Mapping[int, float]
    survives: bool
    has_ended: bool


class Pruning:
    """Cuts one job, by setting its ``best.cut_at``."""

    def __init__(self, section: PruneConfig, job: Job, best: Best, steps: int) -> None:
        self._section, self._job, self._best, self._steps = section, job, best, steps
        self._seen: dict[int, float] = {}
        (job.folder / _FILE).unlink(missing_ok=True)  # of an earlier beginning: one that goes on is judged anew

    def consider(self, record: Mapping[str, Any]) -> None:
        """Cut the job if ``record`` is an evaluation by which the pruner would. One at the end cuts nothing."""
        step, sweep = int(record["step"]), self._job.sweep_folder
        if self._section.pruner is None or sweep is None or not step or self._best.metric not in record:
            return
        self._seen[step] = float(record[self._best.metric])
        if step >= self._steps:
            return
        with FileLock(str(sweep / ".pruning.lock")):  # two jobs that each count on the other must not both go
            rivals = [rival for rival in rivals_of(sweep, self._best.metric) if rival.number != self._job.number]
            if not self._is_kept(rivals) and is_pruned(self._section, self._seen, rivals, self._best.higher_is_better):
                self._best.cut_at = step
                write_text(self._job.folder / _FILE, json.dumps({"step": step}) + "\n")
                log.info(f"cut after {step} of {self._steps} steps, as prune={self._section.name} has it")

    def _is_kept(self, rivals: list[Rival]) -> bool:
        """Whether it is the last of its kind: no other job with the same value of a factor to keep is left."""
        mine = told(self._job.overrides)
        alive = [rival.told for rival in rivals if rival.survives]
        return any(all(other.get(factor) != mine.get(factor) for other in alive) for factor in self._section.keep)


def problems(config: Config) -> list[str]:
    """What is wrong with the section; whether it has a meaning here, and whether Optuna is there."""
    section = config.prune
    if config.task != "train":
        return []
    if section.pruner is None:
        return ["prune.keep has no meaning with prune=none: choose a pruner, or leave it out"] if section.keep else []
    found = [problem for key in section.keep if (problem := unknown_key(key))]
    if importlib.util.find_spec("optuna") is None:
        return [*found, f"prune={section.name} needs Optuna, which is not installed: pip install 'lora_exp[optuna]'"]
    try:
        pruner_of(section, first=1)
    except UserError as error:
        found.append(str(error))
    return found


def refuse_several(section: PruneConfig, processes: int) -> None:
    """Raise UserError where a job's work is shared by several processes, of which one alone sees the others' jobs."""
    if section.pruner is not None and processes > 1:
        raise UserError(f"prune={section.name} is for jobs of one process each, and this one has {processes}")


def rivals_of(sweep: Path, metric: str) -> list[Rival]:
    """Every job that has begun, by number."""
    found = [_rival(folder, metric) for folder in job_folders(sweep)]
    return sorted((rival for rival in found if rival), key=lambda rival: rival.number)


def is_pruned(section: PruneConfig, seen: Mapping[int, float], rivals: list[Rival], higher_is_better: bool) -> bool:
    """Whether the pruner cuts a job with the evaluations ``seen``, beside those ``rivals``."""
    import optuna

    direction = "maximize" if higher_is_better else "minimize"
    with _quietly():
        study = optuna.create_study(direction=direction, pruner=pruner_of(section, min(seen)))
        for rival in rivals:
            trial = study.ask()
            _replayed(trial, rival.evaluations)
            if rival.has_ended and rival.evaluations:
                ends = optuna.trial.TrialState.COMPLETE if rival.survives else optuna.trial.TrialState.PRUNED
                study.tell(trial, _last(rival.evaluations) if rival.survives else None, state=ends)
        return _replayed(study.ask(), seen)


def pruner_of(section: PruneConfig, first: int) -> optuna.pruners.BasePruner:
    """Optuna's class, told the section's options; ``first``: the step of a job's first evaluation.

    Raises UserError for a class that the Optuna that is installed has not, and for options that it does not take.
    """
    import optuna

    kind = getattr(optuna.pruners, str(section.pruner), None)
    if kind is None:
        raise UserError(
            f"prune={section.name} needs optuna.pruners.{section.pruner}, which Optuna {optuna.__version__} has not: "
            "pip install 'optuna>=3.6' (hydra/sweeper=optuna asks for Optuna 2: have an environment for each)"
        )
    options = dict(section.options)
    if "min_resource" in options and options["min_resource"] is None:
        options["min_resource"] = first
    try:
        pruner: optuna.pruners.BasePruner = kind(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"prune.options={section.options} does not suit {section.pruner}: {error}") from error
    return pruner


def told(overrides: list[str]) -> dict[str, str]:
    """Overrides as values by key."""
    return {key.lstrip("+~"): value for key, _, value in (given.partition("=") for given in overrides)}


def _rival(folder: Path, metric: str) -> Rival | None:
    begun = read_begun(folder)
    if begun is None:
        return None
    found = {int(each["step"]): float(each[metric]) for each in read_metrics(folder) if metric in each}
    outcome, is_cut = read_outcome(folder), (folder / _FILE).exists()
    has_ended = outcome is not None or is_cut
    survives = not is_cut and (outcome is None or outcome.status == "FINISHED")
    evaluations = {step: value for step, value in found.items() if step}
    return Rival(begun.number, told(begun.overrides), evaluations, survives, has_ended)


def _replayed(trial: optuna.trial.Trial, evaluations: Mapping[int, float]) -> bool:
    """Report all, asking each time, as some pruners note at which rungs a job was. Returns the last answer."""
    answer = False
    for step in sorted(evaluations):
        trial.report(evaluations[step], step)
        answer = trial.should_prune()
    return answer


def _last(evaluations: Mapping[int, float]) -> float:
    return evaluations[max(evaluations)]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Optuna tells of each study that it is there."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)
