"""Is an arm ever called better than itself? `python -m benchmarks.a_against_a FOLDER [COMPARISONS]`.

FOLDER is that of a sweep over seeds alone (`python -m lora_exp -m +study=a_against_a`). Each comparison draws two arms
of five of its seeds each, none in both, and asks for the verdict on them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lora_exp.sweep.jobs import JobReport, collect
from lora_exp.sweep.verdict.arms import Arm
from lora_exp.sweep.verdict.judging import Judgement, judge
from lora_exp.sweep.verdict.measured import measured

SEEDS, MARGIN = 5, 0.01


def comparisons(folder: Path, count: int) -> list[Judgement]:
    """One judgement each."""
    jobs = [job for job in collect(folder) if job.outcome.status == "FINISHED"]
    if len(jobs) < 2 * SEEDS:
        raise SystemExit(f"{folder} has {len(jobs)} finished jobs, and {2 * SEEDS} are needed for two arms")
    random = np.random.default_rng(0)
    return [_compared([jobs[place] for place in random.permutation(len(jobs))]) for _ in range(count)]


def _compared(jobs: list[JobReport]) -> Judgement:
    """The first seeds as one arm, the next as another, as if each pair of them were the same seed."""
    arms = [
        Arm(name, {str(seed): job for seed, job in enumerate(jobs[start : start + SEEDS])})
        for name, start in (("A", 0), ("A again", SEEDS))
    ]
    [judged] = judge(measured(arms, "loss").samples, MARGIN)
    return judged


def main() -> None:
    folder, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 10
    found = comparisons(folder, count)
    for each in found:
        print(f"{each.effect.difference:.4f} ± {each.effect.half_width:.4f}  {each.finding.value}")
    counted = {name: sum(each.finding.value == name for each in found) for name in {e.finding.value for e in found}}
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
