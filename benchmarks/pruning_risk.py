"""What a pruner would have risked: a sweep that was run whole, judged as if it had been pruned.

    python -m benchmarks.pruning_risk outputs/sweeps/DATE/TIME [--pruner median …]

Jobs that have the same seed are one sweep. Printed by seed: at each evaluation the rank correlation (Spearman's) of the
jobs' losses there with those at the end; and for each pruner, over several orders of the jobs, how much worse than the
best job the best one left is (regret, in nats), and which share of the steps was trained.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from scipy.stats import spearmanr

from lora_exp.config import PruneConfig, conf_folder
from lora_exp.job import RESULT_FILE, read_metrics, read_outcome
from lora_exp.pruning import Rival, is_pruned

Curve = Mapping[int, float]
PRUNERS = ("median", "successive_halving")
ORDERS = 5


def curves_of(folder: Path) -> dict[str, list[Curve]]:
    """The validation losses by step of each job that finished, by seed."""
    found: dict[str, list[Curve]] = defaultdict(list)
    for file in sorted(folder.rglob(RESULT_FILE)):
        outcome, records = read_outcome(file.parent), read_metrics(file.parent)
        if outcome is not None and outcome.status == "FINISHED":
            curve = {int(each["step"]): each["eval/loss"] for each in records if "eval/loss" in each and each["step"]}
            found[str(outcome.values.get("seed"))].append(curve)
    return found


def correlations(curves: Sequence[Curve]) -> dict[int, float]:
    """Spearman's coefficient of the losses at each step with the last ones."""
    last = max(curves[0])
    ends = [curve[last] for curve in curves]
    return {step: float(spearmanr([curve[step] for curve in curves], ends)[0]) for step in curves[0]}


def pruned(curves: Sequence[Curve], section: PruneConfig) -> tuple[float, float]:
    """(regret of the best job left, share of the steps that were trained), had the jobs run one after another."""
    last, rivals, trained = max(curves[0]), list[Rival](), 0
    for number, curve in enumerate(curves):
        cut = first_cut(curve, last, rivals, section)
        seen = {step: value for step, value in curve.items() if step <= (cut or last)}
        rivals.append(Rival(number, {}, seen, survives=cut is None, has_ended=True))
        trained += max(seen)
    left = [curve[last] for curve, rival in zip(curves, rivals, strict=True) if rival.survives]
    return min(left) - min(curve[last] for curve in curves), trained / (last * len(curves))


def first_cut(curve: Curve, last: int, rivals: list[Rival], section: PruneConfig) -> int | None:
    """The step at which the pruner ends the job."""
    for step in sorted(curve):
        if step < last and is_pruned(section, {s: v for s, v in curve.items() if s <= step}, rivals, False):
            return step
    return None


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pruner", nargs="*", default=PRUNERS)
    given = parser.parse_args()
    by_seed = curves_of(given.folder)
    for seed, curves in by_seed.items():
        listed = "  ".join(f"{step}: {value:.2f}" for step, value in correlations(curves).items())
        print(f"seed {seed}, {len(curves)} jobs, rank correlation with the end by step  {listed}")
    for name in given.pruner:
        section = PruneConfig(**yaml.safe_load((conf_folder() / "prune" / f"{name}.yaml").read_text()))
        for seed, curves in by_seed.items():
            found = [pruned(random.Random(order).sample(curves, len(curves)), section) for order in range(ORDERS)]
            regrets, shares = [regret for regret, _ in found], [share for _, share in found]
            print(
                f"{name}, seed {seed}: regret {statistics.mean(regrets):.4f} (at most {max(regrets):.4f}), "
                f"{statistics.mean(shares):.0%} of the steps"
            )


if __name__ == "__main__":
    main()
