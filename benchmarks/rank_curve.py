"""How well one run's rank curve predicts a sweep over ranks: ``python -m benchmarks.rank_curve --seeds 0 1 2``.

For each seed the ranks are trained one by one, and ``task=analyse`` cuts the largest one's adapter to the others.
Both look at the same validation rows. What is finished is not run again, so that an interrupted study goes on.
``--sweep FOLDER`` takes the jobs of a sweep over ranks and seeds (``+study=rank_truncation``) instead of training.
"""

from __future__ import annotations

import argparse
import csv
import datetime as dt
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_exp.sweep.jobs import collect

RANKS, MARGIN = (1, 2, 4, 8, 16), 0.01


@dataclass(frozen=True)
class Study:
    """Of one seed, by rank: the loss of a run of that rank, and what the largest one's curve says (nats)."""

    seed: int
    swept: dict[int, float]
    cut: dict[int, float]

    def difference(self, rank: int) -> float:
        """Predicted minus true."""
        return self.cut[rank] - self.swept[rank]

    def chosen(self, losses: dict[int, float], margin: float) -> int:
        """The smallest rank that is within the margin of the largest."""
        most = losses[max(losses)]
        return min(rank for rank, loss in losses.items() if loss <= most + margin)


def main() -> None:
    given = _parser().parse_args()
    if given.sweep is None:
        studies = [study(seed, given.ranks, Path(given.folder), given.overrides) for seed in given.seeds]
        what = " ".join(given.overrides) or "the default experiment"
    else:
        studies, what = of_sweep(given.sweep), f"the sweep {given.sweep}"
    text = told(studies, given.margin, what)
    print(text)
    file = Path(given.folder) / "rank_curve.md"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    (Path(given.folder) / "rank_curve.json").write_text(json.dumps([vars(each) for each in studies], indent=2) + "\n")
    print(f"written to {file}")


def study(seed: int, ranks: list[int], folder: Path, overrides: list[str]) -> Study:
    """Train what is not trained yet, and cut the largest."""
    swept = {}
    for rank in ranks:
        place = folder / f"seed{seed}" / f"rank{rank}"
        if _result(place) is None:
            _run(f"rank={rank}", f"seed={seed}", f"hydra.run.dir={place}", "tracking=none", *overrides)
        result = _result(place)
        assert result is not None, place
        swept[rank] = float(result["eval_loss"])
    return Study(seed, swept, _cut(folder / f"seed{seed}" / f"rank{max(ranks)}", ranks))


def of_sweep(folder: Path) -> list[Study]:
    """The finished jobs of a sweep, by seed; the largest rank's is cut."""
    jobs = defaultdict[int, dict[int, Path]](dict)
    for job in collect(folder):
        rank, seed = job.value("rank"), job.value("seed")
        if isinstance(rank, int) and isinstance(seed, int) and _result(job.folder) is not None:
            jobs[seed][rank] = job.folder
    if not jobs:
        raise SystemExit(f"{folder} has no finished jobs of a sweep over ranks")
    return [Study(seed, _losses(ranks), _cut(ranks[max(ranks)], sorted(ranks))) for seed, ranks in sorted(jobs.items())]


def _losses(ranks: dict[int, Path]) -> dict[int, float]:
    found = {rank: _result(folder) for rank, folder in sorted(ranks.items())}
    return {rank: float(result["eval_loss"]) for rank, result in found.items() if result is not None}


def _cut(largest: Path, ranks: list[int]) -> dict[int, float]:
    curve = largest / "analyse" / "rank_curve.csv"
    if not curve.is_file():
        asked = f"analyse.ranks=[{','.join(map(str, ranks))}]"
        _run("task=analyse", f"run={largest}", asked, "analyse.intruders=false", "tracking=none")
    with curve.open(newline="") as stream:
        return {int(row["rank"]): float(row["loss"]) for row in csv.DictReader(stream)}


def told(studies: list[Study], margin: float, what: str) -> str:
    """The figures in Markdown: each seed's losses by rank, the differences over seeds, and which rank is chosen."""
    ranks = sorted(studies[0].swept)
    day, machine = dt.date.today().isoformat(), platform.processor() or platform.machine()
    lines = [f"# The rank curve of one run against a sweep over ranks\n\n{day}, {machine}; {what}.\n"]
    lines += ["| seed | rank | sweep | curve | curve - sweep |", "| ---: | ---: | ---: | ---: | ---: |"]
    for each in studies:
        lines += [
            f"| {each.seed} | {rank} | {each.swept[rank]:.4f} | {each.cut[rank]:.4f} | {each.difference(rank):+.4f} |"
            for rank in ranks
        ]
    lines += ["", "| rank | curve - sweep, mean over seeds | standard deviation |", "| ---: | ---: | ---: |"]
    for rank in ranks:
        found = [each.difference(rank) for each in studies]
        spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
        lines.append(f"| {rank} | {statistics.mean(found):+.4f} | {spread} |")
    lines += ["", f"The smallest rank within {margin:g} nats of rank {ranks[-1]}:", ""]
    lines += ["| seed | sweep | curve | agree |", "| ---: | ---: | ---: | --- |"]
    agreed = 0
    for each in studies:
        true, curve = each.chosen(each.swept, margin), each.chosen(each.cut, margin)
        agreed += true == curve
        lines.append(f"| {each.seed} | {true} | {curve} | {'yes' if true == curve else 'no'} |")
    return "\n".join([*lines, "", f"They agree in {agreed} of {len(studies)} seeds.", ""])


def _result(folder: Path) -> dict[str, Any] | None:
    file = folder / "result.json"
    outcome: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return outcome["result"] if outcome.get("status") == "FINISHED" else None


def _run(*overrides: str) -> None:
    print("python -m lora_exp", *overrides, flush=True)
    subprocess.run([sys.executable, "-m", "lora_exp", *overrides], check=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rank_curve", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=list(RANKS))
    parser.add_argument("--margin", type=float, default=MARGIN, help="nats")
    parser.add_argument("--folder", default="outputs/rank_curve")
    parser.add_argument("--sweep", type=Path, help="folder of a sweep over ranks and seeds that has been run")
    parser.add_argument("overrides", nargs="*", default=[], help="of each training, such as train.steps=48")
    return parser


if __name__ == "__main__":
    main()
