"""A sweep that spends the same on each arm: tuned with a few seeds, its chosen values confirmed with fresh ones.

Hydra's part of it is ``hydra_plugins/lora_exp_study``; here is what to run next, seen from what has been found.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_exp.config import ConfigError, StudyConfig
from lora_exp.sweep.jobs import collect
from lora_exp.sweep.verdict.arms import LOOKS, demerit

log = logging.getLogger(__name__)
REPLICATES = 5
Setting = tuple[str, ...]  # overrides
Launch = Callable[[Sequence[Sequence[str]]], object]


@dataclass
class Study:
    """``swept``: the values of each swept key, as typed; ``fixed``: the other overrides; ``seed``: the first one."""

    section: StudyConfig
    swept: Mapping[str, list[str]]
    fixed: Setting
    seed: int
    folder: Path

    def __post_init__(self) -> None:
        if problems := list(self._problems()):
            raise ConfigError(problems)
        self._grids = {key: list(self.swept[key]) for key in self.section.tune}
        factors = {key: values for key, values in self.swept.items() if key not in self.section.tune}
        self._arms: list[Setting] = _product(factors)
        self._numbers: dict[tuple[Setting, Setting], list[int]] = {}  # of the jobs of an arm with tuned values
        self._launched = 0

    def run(self, launch: Launch) -> None:
        """Tune, widen, confirm. ``launch`` runs jobs, numbered on, to their end."""
        tuned = self._tuned(launch)
        replicates = self.section.replicates or REPLICATES
        first = self.seed + (self.section.tune_replicates if self.section.tune else 0)
        log.info(f"study  {replicates} seeds from {first} on for each of {len(tuned)} arms")
        jobs = [
            (*self.fixed, *arm, *tuned[arm], f"seed={seed}", f"{LOOKS}=true")
            for arm in tuned for seed in range(first, first + replicates)
        ]  # fmt: skip
        if jobs:
            launch(jobs)

    def _tuned(self, launch: Launch) -> dict[Setting, Setting]:
        """Each arm's best values, as overrides; an arm of which every value failed is left out, which is said."""
        if not self.section.tune:
            return dict.fromkeys(self._arms, ())
        settings = _product(self._grids)
        for turn in range(self.section.widen + 1):
            self._tune(settings, launch)
            wider = self._wider()
            if not wider:
                break
            if turn == self.section.widen:
                log.warning(f"study  a best value of {', '.join(wider)} is still at the edge: the verdict will say so")
                break
            before = set(_product(self._grids))
            for key, values in wider.items():
                self._grids[key] += values
                log.info(f"study  a best {key} is at the edge of what was tried: {', '.join(values)} too, for each arm")
            settings = [each for each in _product(self._grids) if each not in before]
        found = {arm: self._best(arm) for arm in self._arms}
        for arm in (arm for arm, best in found.items() if best is None):
            tuned = ", ".join(self.section.tune)
            log.warning(f"study  {' '.join(arm)} is left out: no value of {tuned} was trained with each seed")
        return {arm: best for arm, best in found.items() if best is not None}

    def _tune(self, settings: Sequence[Setting], launch: Launch) -> None:
        seeds = range(self.seed, self.seed + self.section.tune_replicates)
        each = [(arm, setting, seed) for arm in self._arms for setting in settings for seed in seeds]
        log.info(f"study  tuning {', '.join(self.section.tune)}: {len(each)} jobs, which leave the test rows alone")
        for number, (arm, setting, _) in enumerate(each, self._launched):
            self._numbers.setdefault((arm, setting), []).append(number)
        self._launched += len(each)
        launch([(*self.fixed, *arm, *setting, f"seed={seed}", f"{LOOKS}=false") for arm, setting, seed in each])

    def _best(self, arm: Setting) -> Setting | None:
        """Its best setting by validation; None if no value was trained with every seed."""
        numbered = {job.outcome.number: job for job in collect(self.folder)}
        settings = [setting for of_arm, setting in self._numbers if of_arm == arm]
        jobs = {each: [numbered[n] for n in self._numbers[arm, each] if n in numbered] for each in settings}
        seeds, metric = self.section.tune_replicates, self.section.metric
        demerits = {each: demerit(jobs[each], seeds, metric) for each in settings}
        best = min(settings, key=demerits.__getitem__)
        return best if math.isfinite(demerits[best]) else None

    def _wider(self) -> dict[str, list[str]]:
        """One more value beyond each edge of a grid at which some arm is best."""
        chosen = [setting for arm in self._arms if (setting := self._best(arm)) is not None]
        best = [dict(each.split("=", 1) for each in setting) for setting in chosen]
        found = {key: beyond(values, [each[key] for each in best]) for key, values in self._grids.items()}
        return {key: values for key, values in found.items() if values}

    def _problems(self) -> list[str]:
        problems = []
        if "seed" in self.swept:
            problems.append("seed is swept, and a study chooses its own seeds: say how many by study.replicates=5")
        missing = [key for key in self.section.tune if key not in self.swept]
        problems += [f"study.tune={key} is not swept: add its values, such as {key}=3e-4,1e-3,3e-3" for key in missing]
        if not set(self.swept) - set(self.section.tune) - {"seed"}:
            problems.append("nothing is compared: sweep something that is not tuned, such as rank=8,16,64")
        return problems


def beyond(values: Sequence[str], best: Sequence[str]) -> list[str]:
    """The next values beyond those edges of a grid of numbers that are among the ``best``, in the grid's own steps."""
    try:
        numbers = sorted(float(value) for value in values)
        edges = {float(value) for value in best}
    except ValueError:  # no numbers have no edge
        return []
    if len(numbers) < 2:
        return []
    low, high = _steps(numbers)
    is_whole = all(float(value).is_integer() and "e" not in value.lower() and "." not in value for value in values)
    found = [low] * (numbers[0] in edges) + [high] * (numbers[-1] in edges)
    if is_whole:
        found = [float(max(1, round(value))) for value in found]
    return [f"{value:.4g}" for value in found if value not in numbers and value > 0]


def _steps(numbers: Sequence[float]) -> tuple[float, float]:
    """The values before the first and behind the last; by their ratio where all are above 0."""
    if numbers[0] > 0:
        return numbers[0] ** 2 / numbers[1], numbers[-1] ** 2 / numbers[-2]
    return 2 * numbers[0] - numbers[1], 2 * numbers[-1] - numbers[-2]


def _product(values: Mapping[str, Sequence[str]]) -> list[Setting]:
    lists = [[f"{key}={value}" for value in found] for key, found in values.items()]
    return list(itertools.product(*lists))
