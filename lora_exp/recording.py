"""What a job earns while it trains, kept as it comes: metrics on disk and in tracking, and the adapter."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable
from types import TracebackType

from lora_exp.config import PruneConfig
from lora_exp.job import METRICS_FILE, Job, read_metrics, write_begun
from lora_exp.keeping import Keeping
from lora_exp.machine import signals
from lora_exp.progress import TrainingProgress
from lora_exp.pruning import Pruning
from lora_exp.tracking import mlflow as tracking
from lora_exp.training.loop import Record
from lora_exp.training.trainer import Work
from lora_exp.training.utilisation import Utilisation


class Recorder:
    """Takes a job's records. As a context manager it holds the file and the progress bar open.

    Where ``work`` goes on from a checkpoint, they come behind those that the job's file holds.
    """

    def __init__(
        self, tracked: tracking.Run, work: Work, job: Job, share: Utilisation, prune: PruneConfig | None = None
    ) -> None:
        self.records: list[Record] = []
        self._writes = work.world.leads  # of several processes one does
        self._tracked, self._job, self._share = tracked, job, share
        self._goes_on, self._digest, self._length = work.start is not None, hashlib.sha256(), 0
        self._keeping = Keeping(work, job.folder)
        self._steps = work.timetable.steps
        self._pruning = Pruning(prune or PruneConfig(), job, work.best, self._steps)
        self._progress = TrainingProgress(self._steps)
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Recorder:
        if not self._writes:
            return self
        self._stream = self._open.enter_context((self._job.folder / METRICS_FILE).open("a" if self._goes_on else "w"))
        self._open.enter_context(self._progress)
        write_begun(self._job, self._steps)
        if self._goes_on:
            self._take_up()
        return self

    def position(self) -> dict[str, int | str]:
        """How many ``bytes`` the file of metrics has by now, all of them on the disk, and their ``sha256``."""
        os.fsync(self._stream.fileno())
        return {"bytes": self._length, "sha256": self._digest.hexdigest()}

    def _take_up(self) -> None:
        """Tracking is told what it may have missed; it takes each point once."""
        self._count((self._job.folder / METRICS_FILE).read_bytes())
        self.records = read_metrics(self._job.folder)
        for record in self.records:
            self._track(record)

    def _count(self, written: bytes) -> None:
        self._digest.update(written)
        self._length += len(written)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._open.close()
        if error is not None and self._writes:
            with contextlib.suppress(Exception):  # the first error is the one to report
                log_files(self._tracked, self._job, self.records)

    def keep(self, record: Record) -> None:
        """Take one record; after an evaluation save the adapter, as what is earned so far outlives a later failure."""
        if not self._writes:
            self.records.append(record)
            return
        record |= self._share.figures(record)
        line = json.dumps(record) + "\n"
        self._stream.write(line)
        self._stream.flush()
        self._count(line.encode())
        self._track(record)
        self._progress.show(record)
        self.records.append(record)
        self._keeping.consider(record)
        self._pruning.consider(record)
        signals.obey()

    def _track(self, record: Record) -> None:
        self._tracked.log_metrics(metrics_of(record), step=int(record["step"]))


def metrics_of(record: Record) -> dict[str, float]:
    """What tracking is told of a record."""
    metrics = {name: float(value) for name, value in record.items() if name not in ("lane", "step")}
    if record["step"] == 0 and "eval/loss" in record:
        metrics["eval/loss_before"] = metrics["eval/loss"]
    return metrics


def log_files(tracked: tracking.Run, job: Job, records: list[Record]) -> None:
    """Hand the job's files to tracking: its metrics, their picture, the adapter."""
    if not records:
        return
    from lora_exp.plots import loss_curve  # imports matplotlib, which the first step need not wait for

    picture = job.folder / "loss_curve.png"
    loss_curve(_points(records, "train/loss"), _points(records, "eval/loss"), picture)
    has_saved = any("eval/loss" in record and record["step"] for record in records)  # else it is an earlier run's
    adapter = [(job.folder / "adapter", "adapter")] if has_saved else []
    for path, folder in ((job.folder / METRICS_FILE, None), (picture, None), *adapter):
        if path.exists():
            tracked.log_artifact(path, folder)


def _points(records: Iterable[Record], name: str) -> list[tuple[float, float]]:
    return [(float(record["step"]), float(record[name])) for record in records if name in record]
