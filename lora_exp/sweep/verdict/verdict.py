"""The verdict on a sweep."""

from __future__ import annotations

import itertools
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from lora_exp.config import StudyConfig
from lora_exp.job import Result
from lora_exp.sweep.jobs import JobReport
from lora_exp.sweep.verdict.arms import LOOKS, Arm, arms_of
from lora_exp.sweep.verdict.judging import Finding, Judgement, Sample, judge
from lora_exp.sweep.verdict.measured import Measured, measured
from lora_exp.training.metrics import higher_is_better


@dataclass(frozen=True)
class Cost:
    """What a replicate of an arm costs, in the mean; ``tokens`` (or rows, as ``unit`` says) that it learnt from."""

    trainable: int
    peak_memory_gib: float
    wall_s: float
    tokens: float
    unit: str


@dataclass(frozen=True)
class Verdict:
    """``arms`` and their ``samples`` and ``costs``, best first; ``judgements`` of their pairs, surest first.

    ``recommended``: the arm's place. ``has_fresh_seeds``: whether values were tuned with other seeds than arms were
    compared with, and the test rows opened at the end.
    """

    study: StudyConfig
    arms: list[Arm]
    costs: list[Cost]
    measured: Measured
    judgements: list[Judgement]
    recommended: int
    has_fresh_seeds: bool
    higher_is_better: bool
    samples: list[Sample] = field(default_factory=list)

    @property
    def seeds(self) -> int:
        """That every pair has at least; 1 where nothing can be compared."""
        return min((each.effect.seeds for each in self.judgements), default=1)

    @property
    def command(self) -> str:
        """The recommended config, to be run."""
        return command_of(self.arms[self.recommended])


def verdict_of(jobs: Sequence[JobReport], names: Sequence[str], study: StudyConfig) -> Verdict | None:
    """What the jobs say about what was swept (``names``); None where nothing was trained, or no arms differ."""
    arms = arms_of(jobs, names, study)
    if len(arms) < 2:
        return None
    rises = higher_is_better(f"eval/{study.metric}")
    found = measured(arms, study.metric)
    known = [(arm, sample) for arm, sample in zip(arms, found.samples, strict=True) if sample.replicates]
    if len(known) < 2:
        return None
    known.sort(key=lambda each: -each[1].mean if rises else each[1].mean)
    arms, samples = [arm for arm, _ in known], [sample for _, sample in known]
    judgements = judge(samples, study.margin, rises)
    costs = [_cost(arm) for arm in arms]
    fresh = any(job.value(LOOKS) is False for job in jobs)
    best = _recommended(arms, costs, judgements)
    return Verdict(study, arms, costs, found, judgements, best, fresh, rises, samples)


def command_of(arm: Arm) -> str:
    """The command line of an arm's config, without its seed."""
    job = next(iter(arm.jobs.values()))
    left_out = ("seed", LOOKS, "study.")
    kept = [each for each in job.outcome.overrides if not each.lstrip("+~").startswith(left_out)]
    return f"python -m lora_exp {shlex.join(kept)}".rstrip()


def _recommended(arms: list[Arm], costs: list[Cost], judgements: list[Judgement]) -> int:
    """The best one, or of those that are indistinguishable from it the one that trains the fewest parameters."""
    best = arms[0].label
    alike = {each.first if each.second == best else each.second for each in judgements
             if each.finding is Finding.ALIKE and best in (each.first, each.second)}  # fmt: skip
    among = [place for place, arm in enumerate(arms) if arm.label in alike] + [0]
    return min(among, key=lambda place: (costs[place].trainable, place))


def _cost(arm: Arm) -> Cost:
    jobs = list(arm.jobs.values())
    results = [job.outcome.result for job in jobs if isinstance(job.outcome.result, Result)]
    return Cost(
        results[0].trainable,
        fmean(result.peak_memory_gib for result in results),
        fmean(result.wall_s for result in results),
        fmean(itertools.starmap(_seen, zip(jobs, results, strict=True))),
        "tokens" if jobs[0].value("data.block_size") else "rows",
    )


def _seen(job: JobReport, result: Result) -> float:
    """What the adapter that was kept has learnt from, in tokens of a text cut to blocks, else in rows."""
    sizes = ("train.micro_batch_size", "train.grad_accum_steps", "data.block_size")
    found = [job.value(name) for name in sizes]
    return result.step * math.prod(float(str(size)) for size in found if size)
