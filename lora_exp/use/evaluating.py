"""``task=evaluate``: the base, each run's model and each adapter merged, on the rows of one split, and forgetting."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from lora_exp.adapters import LoraModel
from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.job import Job, UseResult
from lora_exp.machine import signals
from lora_exp.progress import Steps
from lora_exp.tracking import finished
from lora_exp.training.metrics import Metric, chosen, mean_loss
from lora_exp.use.bytes import bits_per_byte, predicted_bytes
from lora_exp.use.evaluation import ADAPTED, MERGED, Evaluation, Line
from lora_exp.use.loading import BASE, Trained, load_trained
from lora_exp.use.looking import Look, Seen
from lora_exp.use.rows import Rows, asked_rows, forgotten_rows

log = logging.getLogger(__name__)
FOLDER = "evaluate"  # of a run's artifacts


def evaluate(config: Config, job: Job) -> UseResult:
    """Load once, look at the rows, print, write and tell MLflow what was found."""
    section = config.evaluate
    trained = load_trained(config)
    _check_data_named(trained, job)
    logs_to = [run.run_id for run in trained.runs.values() if run.run_id and config.tracking.enabled]
    if logs_to:
        with signals.at_once():
            logs_to = finished.known(config.tracking, logs_to)
    done = Evaluation.of(trained)
    rows = asked_rows(trained, config)
    _say_other_data(rows, trained, done)
    _look(done, rows, trained, config, merges=section.merged)
    if (forgotten := forgotten_rows(trained, config)) is not None:
        _look(done, forgotten, trained, config, merges=False)
    done.show()
    files = done.write(job.folder)
    for run in trained.runs.values():
        if run.run_id in logs_to:
            finished.log_figures(
                config.tracking, run.run_id or "", done.figures_of(run), run.at_step or 0, files[0], FOLDER
            )
    return UseResult(done.objective(), [str(file) for file in files])


@dataclass(frozen=True)
class _Lines:
    """Makes a line of what a model found on ``rows``, whose predicted text has ``size`` bytes."""

    rows: Rows
    metrics: Mapping[str, Metric]
    size: int

    def line(self, name: str, way: str, seen: Seen, written: Mapping[str, float]) -> Line:
        figures = {each: metric(seen.sums) for each, metric in self.metrics.items()}
        bits = {"bits_per_byte": bits_per_byte(seen.sums, self.size)} if self.size else {}
        rows = self.rows
        return Line(name, way, rows.label, rows.split, rows.count, rows.total, {**figures, **bits, **written})


def _look(done: Evaluation, rows: Rows, trained: Trained, config: Config, merges: bool) -> None:
    """Add what every model finds on ``rows``."""
    batches = rows.batches(config.train.micro_batch_size)
    names = [name for name in trained.names if name != BASE or config.evaluate.base]
    merging = list(trained.runs) if merges and isinstance(trained.model, LoraModel) else []
    own = config.train.metrics if rows.kind.kind == config.data.kind else []
    size = predicted_bytes(batches, trained.tokenizer) if rows.kind.unit == "tokens" else 0
    lines = _Lines(rows, chosen(*rows.kind.metrics, *own), size)
    with Steps(f"{rows.label} {rows.split}", len(batches) * (len(names) + len(merging))) as bar:
        look = Look(trained, rows.kind, batches, bar)
        found = _by_adapters(look, names, config)
        for name, seen in found.items():
            done.lines.append(
                lines.line(name, BASE if name == BASE else ADAPTED, seen, _written(rows, trained, trained.using(name)))
            )
        for name in merging:
            _merge(done, look, lines, name, found[name])


def _by_adapters(look: Look, names: list[str], config: Config) -> Mapping[str, Seen]:
    """Several adapters in one pass over the base, unless that is not wanted or the model does not allow it."""
    together = config.evaluate.together
    several = len(look.trained.runs) > 1 if together is None else together
    if several and isinstance(look.trained.model, LoraModel):
        try:
            return look.together(names)
        except UserError as error:
            log.info(f"one adapter after the other, as they cannot be looked at together: {error}")
    return {name: look.alone(name) for name in names}


def _merge(done: Evaluation, look: Look, lines: _Lines, name: str, adapted: Seen) -> None:
    """Add the merged model's line, and by how much it differs from the adapted one."""
    try:
        with look.merged(name) as merged:
            seen = merged()
            written = _written(lines.rows, look.trained, contextlib.nullcontext())
    except UserError as error:
        done.notes.append(f"{done.letters[name]} is not merged: {error}")
        return
    done.lines.append(lines.line(name, MERGED, seen, written))
    loss = mean_loss(seen.sums) - mean_loss(adapted.sums)
    done.note_merged(name, loss, float((seen.losses - adapted.losses).abs().max()))


def _written(rows: Rows, trained: Trained, using: AbstractContextManager[object]) -> Mapping[str, float]:
    """What the model writes for these rows' questions, where the data asks for that (``data.written``)."""
    write = rows.data.written_of(rows.rows)
    if write is None:
        return {}
    with using, trained.place.compute():
        return dict(write(trained.model, trained.place.device, signals.obey))


def _check_data_named(trained: Trained, job: Job) -> None:
    """An adapter that lies alone says nothing of its data, and the default's would not be it."""
    alone = [run for run in trained.runs.values() if run.folder is None]
    if alone and not any(override.startswith(("data=", "data.", "+data")) for override in job.overrides):
        raise UserError(
            f"run={alone[0].adapter} is an adapter alone, which says no data: add data=NAME, or name its run"
        )


def _say_other_data(rows: Rows, trained: Trained, done: Evaluation) -> None:
    """Rows of which a run may have been trained on some."""
    for name, run in trained.runs.items():
        theirs = run.result.data_fingerprint if run.result is not None else ""
        if theirs and rows.data.fingerprint and theirs != rows.data.fingerprint:
            done.notes.append(
                f"{done.letters[name]} was not trained on this very data: if it is cut otherwise alone, "
                "rows may be among those it has learnt"
            )
