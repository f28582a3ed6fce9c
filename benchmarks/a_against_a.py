"""Is an arm ever called better than itself? `python -m benchmarks.a_against_a FOLDER [SEEDS]`.

FOLDER is that of a sweep over seeds alone (`python -m lora_exp -m +study=a_against_a`). Each comparison draws two arms
of SEEDS (5) of its seeds each, none in both, and asks for the verdict on them. No two comparisons are of the same two
arms.
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

COMPARISONS, MARGIN = 10, 0.01


def comparisons(folder: Path, seeds: int) -> list[Judgement]:
    """One judgement each."""
    jobs = [job for job in collect(folder) if job.outcome.status == "FINISHED"]
    if len(jobs) < 2 * seeds or seeds < 3:
        raise SystemExit(f"{folder} has {len(jobs)} finished jobs: two arms of {seeds} seeds (3 at least) need more")
    random, drawn = np.random.default_rng(0), dict[frozenset[frozenset[int]], list[int]]()
    while len(drawn) < COMPARISONS:
        places = [int(place) for place in random.permutation(len(jobs))[: 2 * seeds]]
        drawn.setdefault(frozenset({frozenset(places[:seeds]), frozenset(places[seeds:])}), places)
    return [_compared([jobs[place] for place in places]) for places in drawn.values()]


def _compared(jobs: list[JobReport]) -> Judgement:
    """The first seeds as one arm, the next as another, as if each pair of them were the same seed."""
    arms = [
        Arm(name, {str(seed): job for seed, job in enumerate(half)})
        for name, half in (("A", jobs[: len(jobs) // 2]), ("A again", jobs[len(jobs) // 2 :]))
    ]
    [judged] = judge(measured(arms, "loss").samples, MARGIN)
    return judged


def main() -> None:
    found = comparisons(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
    for each in found:
        print(f"{each.effect.difference:.4f} ± {each.effect.half_width:.4f}  {each.finding.value}")
    counted = {name: sum(each.finding.value == name for each in found) for name in {e.finding.value for e in found}}
    print(json.dumps(counted))


if __name__ == "__main__":
    main()
