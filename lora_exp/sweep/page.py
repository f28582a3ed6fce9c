"""The report of a sweep: one HTML file that needs nothing else, also without a network."""

from __future__ import annotations

import html
from pathlib import Path

from plotly.offline import get_plotlyjs

from lora_exp.adapters.files.whole import write_text
from lora_exp.sweep.figures import Figure
from lora_exp.sweep.interactive import interactive, interactive_parallel
from lora_exp.sweep.jobs import JobReport
from lora_exp.sweep.parallel import Parallel
from lora_exp.sweep.table import Table

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top; }
th { cursor: pointer; position: sticky; top: 0; background: #fff; white-space: nowrap; }
th::after { content: " ↕"; color: #aaa; } td:last-child, th:last-child { text-align: left; min-width: 9rem; }
.verdict { background: #f4f6f9; padding: .3rem 1.2rem 1rem; border-radius: 6px; margin-bottom: 1rem; }
.verdict h2 { margin-top: .6rem; }
.arms td:first-child { text-align: left; } .arms td:last-child { text-align: right; min-width: 0; }
tr.best { background: #eaf5ec; } tr.unfinished { color: #a1232f; } .note { color: #666; font-size: 13px; margin: 0; }
"""
_CONFIG = {"displaylogo": False, "responsive": True, "modeBarButtonsToRemove": ["sendChartToCloud"]}  # nothing leaves
_SORT = """
document.querySelectorAll("th").forEach((th, column) => th.addEventListener("click", () => {
  const body = th.closest("table").tBodies[0], up = th.dataset.up !== "1";
  const read = row => { const said = row.cells[column].textContent.replace(/,(?=\\d{3})/g, "");
    const found = said === "" || isNaN(parseFloat(said)) ? null : parseFloat(said); return [found, said]; };
  const rows = [...body.rows].sort((one, other) => { const [a, s] = read(one), [b, t] = read(other);
    if ((s === "") !== (t === "")) return s === "" ? 1 : -1;
    const order = a !== null && b !== null ? a - b : s.localeCompare(t); return up ? order : -order; });
  document.querySelectorAll("th").forEach(each => delete each.dataset.up); th.dataset.up = up ? "1" : "0";
  rows.forEach(row => body.append(row));
}));
"""


def write_page(
    path: Path, heading: str, jobs: list[JobReport], table: Table, figures: list[Figure], parallels: list[Parallel],
    verdict: str = "",
) -> None:  # fmt: skip
    """Write it; ``jobs`` are those of the table's rows, ``verdict`` is HTML that stands above."""
    drawn = [(each.title, each.told, interactive(each)) for each in figures]
    drawn += [(each.title, "Drag along an axis to pick jobs.", interactive_parallel(each)) for each in parallels]
    sections = [
        f"<h2>{html.escape(title)}</h2>\n<p class=note>{html.escape(note)}</p>\n"
        + figure.to_html(full_html=False, include_plotlyjs=False, config=_CONFIG)
        for title, note, figure in drawn
    ]
    library = f"<script>{get_plotlyjs()}</script>" if drawn else ""
    write_text(
        path,
        f"<!doctype html>\n<html lang=en><head><meta charset=utf-8><title>{html.escape(heading)}</title>\n"
        f"<style>{_STYLE}</style>{library}</head>\n<body><h1>{html.escape(heading)}</h1>\n{verdict}\n"
        f"<p class=note>{_summary(jobs)}</p>\n{_table(table, jobs)}\n{''.join(sections)}\n"
        f"<script>{_SORT}</script></body></html>\n",
    )


def _summary(jobs: list[JobReport]) -> str:
    counts = {status: sum(job.outcome.status == status for job in jobs) for status in ("FINISHED", "FAILED", "KILLED")}
    told = ", ".join(f"{count} {status.lower()}" for status, count in counts.items() if count)
    return f"{len(jobs)} jobs: {told}. Best first; a click on a column sorts by it."


def _table(table: Table, jobs: list[JobReport]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in table.header)
    rows = []
    for index, (row, job) in enumerate(zip(table.rows, jobs, strict=True)):
        is_finished = job.outcome.status == "FINISHED"
        kind = ("best" if index == 0 else "") if is_finished else "unfinished"
        status = f"{job.status}: {job.reason}" if job.reason else job.status
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in (*row[:-1], status))
        rows.append(f'<tr class="{kind}">{cells}</tr>')
    body = "\n".join(rows)
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>"
