"""The verdict where people look: the terminal, MLflow, the page, and files for programs."""

from __future__ import annotations

import html
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from lora_exp.adapters.files.whole import write_text
from lora_exp.sweep.verdict.judging import Judgement
from lora_exp.sweep.verdict.verdict import Verdict
from lora_exp.sweep.verdict.wording import arm_cells, arm_lines, lines

JSON_FILE, TEXT_FILE = "verdict.json", "verdict.md"
_MOST_ARMS = 12  # on a terminal


def show(verdict: Verdict) -> None:
    """Print it."""
    console = Console()
    arms = arm_lines(verdict) if verdict.judgements else []  # else the table says no less
    more = [f"… and {len(arms) - _MOST_ARMS} more arms: {TEXT_FILE}"] if len(arms) > _MOST_ARMS else []
    told = ["Verdict", *(f"  {line}" for line in (*lines(verdict), *arms[:_MOST_ARMS], *more)), ""]
    console.print("\n".join(told), markup=False, highlight=False, soft_wrap=True)


def markdown(verdict: Verdict) -> str:
    """As MLflow shows it."""
    told = [f"- {_escaped(line)}" for line in lines(verdict)]
    cells = arm_cells(verdict)
    if not verdict.judgements:
        return "\n".join(["**Verdict**", "", *told, "", ""])
    header = [name or "arm" for name in cells[0]]
    rows = [header, ["---"] * len(header), *([_escaped(value) for value in each.values()] for each in cells)]
    return "\n".join(["**Verdict**", "", *told, "", *(f"| {' | '.join(row)} |" for row in rows), "", ""])


def section(verdict: Verdict) -> str:
    """As the page begins."""
    told = "".join(f"<li>{html.escape(line)}</li>" for line in lines(verdict))
    cells = arm_cells(verdict)
    head = "".join(f"<td><b>{html.escape(name or 'arm')}</b></td>" for name in cells[0])
    rows = "".join(f"<tr>{''.join(f'<td>{html.escape(value)}</td>' for value in each.values())}</tr>" for each in cells)
    if not verdict.judgements:
        head = rows = ""
    table = f"<div class=scroll><table class=arms><tbody><tr>{head}</tr>{rows}</tbody></table></div>"
    return f"<section class=verdict><h2>Verdict</h2><ul>{told}</ul>{table}</section>"


def write(verdict: Verdict, folder: Path) -> list[Path]:
    """Keep it beside the jobs. Returns the files."""
    write_text(folder / TEXT_FILE, markdown(verdict))
    write_text(folder / JSON_FILE, json.dumps(as_json(verdict), indent=2) + "\n")
    return [folder / TEXT_FILE, folder / JSON_FILE]


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Everything that it rests on."""
    arms = [
        {
            "arm": arm.label, "tuned": arm.tuned, "on_edge": arm.on_edge, "mean": sample.mean,
            "values": {seed: each.value for seed, each in sample.replicates.items()}, "cost": asdict(cost),
        }
        for arm, sample, cost in zip(verdict.arms, verdict.samples, verdict.costs, strict=True)
    ]  # fmt: skip
    found = verdict.measured
    return {
        "metric": verdict.study.metric, "margin": verdict.study.margin, "split": found.split, "rows": found.rows,
        "arms": arms, "pairs": [_pair(each) for each in verdict.judgements],
        "recommended": verdict.arms[verdict.recommended].label, "command": verdict.command, "lines": lines(verdict),
    }  # fmt: skip


def _pair(judged: Judgement) -> dict[str, Any]:
    effect = asdict(judged.effect) | {"half_width": judged.effect.half_width}
    return {
        "first": judged.first, "second": judged.second, "finding": judged.finding.value, **effect,
        "p_value": judged.p_value, "p_beyond_margin": judged.p_beyond,
    }  # fmt: skip


def _escaped(line: str) -> str:
    return line.replace("|", "\\|")
