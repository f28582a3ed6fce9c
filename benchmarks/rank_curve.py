"""How well one run's rank curve predicts a sweep over ranks: ``python -m benchmarks.rank_curve --seeds 0 1 2``.

For each seed the ranks are trained one by one, and ``task=analyse`` cuts the largest one's adapter to the others.
Both look at the same validation rows. What is finished is not run again, so that an interrupted study goes on.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    studies = [study(seed, given.ranks, Path(given.folder), given.overrides) for seed in given.seeds]
    text = told(studies, given.margin, given.overrides)
    print(text)
    file = Path(given.folder) / "rank_curve.md"
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
    largest = folder / f"seed{seed}" / f"rank{max(ranks)}"
    curve = largest / "analyse" / "rank_curve.csv"
    if not curve.is_file():
        asked = f"analyse.ranks=[{','.join(map(str, ranks))}]"
        _run("task=analyse", f"run={largest}", asked, "analyse.intruders=false", "tracking=none")
    with curve.open(newline="") as stream:
        cut = {int(row["rank"]): float(row["loss"]) for row in csv.DictReader(stream)}
    return Study(seed, swept, cut)


def told(studies: list[Study], margin: float, overrides: list[str]) -> str:
    """The figures in Markdown: each seed's losses by rank, the differences over seeds, and which rank is chosen."""
    ranks = sorted(studies[0].swept)
    said = " ".join(overrides) or "the default experiment"
    day, machine = dt.date.today().isoformat(), platform.processor() or platform.machine()
    lines = [f"# The rank curve of one run against a sweep over ranks\n\n{day}, {machine}; {said}.\n"]
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
    parser.add_argument("overrides", nargs="*", default=[], help="of each training, such as train.steps=48")
    return parser


if __name__ == "__main__":
    main()
