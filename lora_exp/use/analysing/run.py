"""``task=analyse`` from a config to figures, files and what MLflow is told."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lora_exp.adapters import LoraModel
from lora_exp.adapters.inspection.changes import Change, changes, unmeasured
from lora_exp.adapters.shrinking import add_shrunk
from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.machine.saving import replace_folder
from lora_exp.progress import Steps
from lora_exp.tracking import finished
from lora_exp.use.analysing.curve import Curve, cut_name, own_rank, rank_curve
from lora_exp.use.analysing.files import write_curve, write_layers, write_overlaps
from lora_exp.use.analysing.overlap import grid, overlaps
from lora_exp.use.analysing.pictures import draw_curve, draw_effective_ranks, draw_overlap, draw_spectra
from lora_exp.use.analysing.spectrum import LayerFigures, figures_of
from lora_exp.use.found import FoundRun
from lora_exp.use.loading import Trained, load_trained
from lora_exp.use.rows import asked_rows

log = logging.getLogger(__name__)
FOLDER = "analyse"  # of a run's own folder, and of its artifacts
SHRUNK = "shrunk"  # where the adapter of the smallest rank lies, in PEFT's format


@dataclass
class Analysis:
    """Of one run: its layers, its curve if one was asked for, and the files that say so."""

    layers: list[LayerFigures]
    curve: Curve | None = None
    files: list[Path] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """By the names that MLflow has them under, below ``analyse/``."""
        count = len(self.layers)
        means = {name: sum(getattr(layer, name) for layer in self.layers) / count
                 for name in ("effective_rank", "stable_rank", "relative")}  # fmt: skip
        found = {f"{name}_mean": value for name, value in means.items()}
        counts = [layer.intruders for layer in self.layers if layer.intruders is not None]
        found |= {"intruders": float(sum(counts))} if counts else {}
        if (curve := self.curve) is None:
            return found
        found |= {"loss": curve.loss, "base_loss": curve.base}
        found |= {f"loss_rank_{point.rank}": point.loss for point in curve.points}
        return found | ({"smallest_rank": float(curve.smallest)} if curve.smallest is not None else {})


def analyse(config: Config, job: Job) -> UseResult:
    """Take apart what each run has changed, look at smaller ranks, compare runs, and say, write and track it.

    Raises UserError for runs that hold no adapter of ours.
    """
    trained = load_trained(config)
    model = trained.model
    if not isinstance(model, LoraModel):
        raise UserError("task=analyse is about adapters: name runs that trained one, not weights of the base")
    logs_to = _known(trained, config)
    taken = {name: _changes(model, name) for name in trained.runs}
    results = {}
    for name, run in list(trained.runs.items()):
        results[name] = _one(trained, config, name, taken[name], _folder(run, job))
        _show(name, results[name])
    shared = _compared(taken, job.folder) if len(taken) > 1 else []
    for name, run in trained.runs.items():
        if run.run_id in logs_to:
            _tell(config, run, results[name], shared)
    files = [file for result in results.values() for file in result.files] + shared
    return UseResult(next(iter(results.values())).figures(), [str(file) for file in files])


def _changes(model: LoraModel, name: str) -> dict[str, Change]:
    for layer in unmeasured(model.wrapped, name):
        log.warning(f"{layer} is left out: its weight is many matrices")
    found: dict[str, Change] = {}
    for change in changes(model.wrapped, name):
        signals.obey()
        found[change.layer] = change
    if not found:
        raise UserError(f"{name} has changed no weight that is one matrix: there is nothing to take apart")
    return found


def _one(trained: Trained, config: Config, name: str, found: Mapping[str, Change], folder: Path) -> Analysis:
    section = config.analyse
    layers = []
    with Steps(f"{name} layers", len(found)) as bar:
        for change in found.values():
            signals.obey()
            layers.append(figures_of(change, section))
            bar.advance()
    folder.mkdir(parents=True, exist_ok=True)
    files = write_layers(layers, folder)
    files += [draw_spectra(layers, folder / "spectra.png")]
    files += [draw_effective_ranks(layers, folder / "effective_ranks.png")]
    if not section.curve:
        return Analysis(layers, None, files)
    rows = asked_rows(trained, config)
    curve = rank_curve(trained, name, found, rows, section.ranks, section.margin)
    files += [write_curve(curve, folder), draw_curve(curve, folder / "rank_curve.png")]
    if section.save and curve.smallest is not None:
        _save(trained, name, curve.smallest, found, folder / SHRUNK)
    return Analysis(layers, curve, files)


def _save(trained: Trained, name: str, rank: int, found: Mapping[str, Change], folder: Path) -> None:
    """Write the adapter cut to ``rank`` in PEFT's format, unless the run's own is as small."""
    model, cut = trained.model, cut_name(name, rank)
    assert isinstance(model, LoraModel)
    if rank >= own_rank(model, name) and not any(change.is_dense for change in found.values()):
        log.info(f"no smaller rank than {name}'s own is within analyse.margin: nothing is saved")
        return
    add_shrunk(model, name, cut, rank, found)
    try:
        replace_folder(folder, lambda place: model.save_pretrained(place, cut, trained.digest))
    finally:
        model.delete_adapter(cut)
    log.info(f"adapter cut to rank {rank}: {folder}")


def _compared(taken: Mapping[str, Mapping[str, Change]], folder: Path) -> list[Path]:
    """What pairs of runs share."""
    found = list(overlaps(taken))
    if not found:
        log.info("the runs have changed no layer in common: nothing to compare")
        return []
    files = [write_overlaps(found, folder)]
    for one, other in dict.fromkeys((each.one, each.other) for each in found):
        picture = folder / f"overlap-{one}-{other}.png"
        files.append(draw_overlap(grid(taken[one], taken[other]), one, other, picture))
        pair = [each for each in found if (each.one, each.other) == (one, other)]
        for rank in sorted({each.rank for each in pair}):
            here = [each for each in pair if each.rank == rank]
            mean, chance = (sum(getattr(each, key) for each in here) / len(here) for key in ("by_inputs", "chance"))
            log.info(f"{one} and {other}: of {rank} directions of inputs {mean:.3f} are shared, by chance {chance:.3f}")
    return files


def _show(name: str, found: Analysis) -> None:
    figures = found.figures()
    intruders = f", {figures['intruders']:.0f} intruder dimensions" if "intruders" in figures else ""
    log.info(
        f"{name}: {len(found.layers)} layers, effective rank {figures['effective_rank_mean']:.2f} on average, change "
        f"{figures['relative_mean']:.2%} of the weights{intruders}"
    )
    if found.curve is None:
        return
    table = Table(title=f"{name}, {found.curve.rows} rows", title_justify="left")
    for title in ("rank", "loss", "above", "±", "kept"):
        table.add_column(title, justify="right")
    for row in _cells(found.curve):
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=80)).print(table, markup=False)
    smallest, margin = found.curve.smallest, found.curve.margin
    said = f"rank {smallest} is the smallest" if smallest is not None else "no rank is"
    log.info(f"{said} within {margin:g} nats of the run's loss {found.curve.loss:.4f}")


def _cells(curve: Curve) -> Iterator[list[str]]:
    for point in curve.points:
        error = f"{1.96 * point.error:.4f}"
        yield [str(point.rank), f"{point.loss:.4f}", f"{point.above:+.4f}", error, f"{point.kept:.1%}"]
    yield ["as trained", f"{curve.loss:.4f}", "", "", ""]
    yield ["base", f"{curve.base:.4f}", f"{curve.base - curve.loss:+.4f}", "", ""]


def _folder(run: FoundRun, job: Job) -> Path:
    """In the run's own folder, where it has one."""
    return (run.folder or job.folder / run.slug) / (FOLDER if run.step is None else f"{FOLDER}-step-{run.step}")


def _known(trained: Trained, config: Config) -> list[str]:
    named = [run.run_id for run in trained.runs.values() if run.run_id and config.tracking.enabled]
    with signals.at_once():
        return finished.known(config.tracking, named) if named else []


def _tell(config: Config, run: FoundRun, found: Analysis, shared: list[Path]) -> None:
    figures = {f"analyse/{name}": value for name, value in found.figures().items()}
    section, run_id, step = config.tracking, run.run_id or "", run.at_step or 0
    for file in [*found.files, *shared]:
        finished.log_figures(section, run_id, figures, step, file, FOLDER)
        figures = {}
