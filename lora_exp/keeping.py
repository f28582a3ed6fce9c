"""Which adapter of a training stays in the job's folder: the last evaluation's, or the best one's."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from lora_exp.adapters.files.safetensors import copy_strictly, read_tensors, write_tensors
from lora_exp.backends import Adapted
from lora_exp.machine import signals
from lora_exp.machine.saving import replace_folder
from lora_exp.training.loop import Record
from lora_exp.training.trainer import Work
from lora_exp.training.watch import DivergedError, all_finite

VALUES_FILE = ".best.safetensors"  # of a job's folder while it trains: the best values as they are


class Keeping:
    """Saves the adapter as evaluations come, so that what is earned so far outlives a later failure."""

    def __init__(self, work: Work, folder: Path) -> None:
        self._work, self._folder = work, folder
        if work.start is None and work.world.leads:
            (folder / VALUES_FILE).unlink(missing_ok=True)  # an earlier run's

    def consider(self, record: Record) -> None:
        """Save the adapter if ``record`` is an evaluation of the one that stays so far."""
        best, keeps_best = self._work.best, self._work.train.keeps_best
        is_best = best.note(record) or best.step is None  # where nothing tells which is best, the last one stays
        if "eval/loss" not in record or not record["step"] or (keeps_best and not is_best):
            return
        save_adapter(self._work.adapted, self._folder / "adapter")
        if keeps_best and (self._work.data.test is not None or self._work.data.written):
            write_tensors(self._folder / VALUES_FILE, _numbered(self._work), {})


def take_back_kept(work: Work, folder: Path) -> None:
    """Have the model be what is saved in ``folder``, where the training went on from there to nothing better.

    The file stays: a run that is interrupted later must find it again. Of several processes the one that wrote it
    reads it.
    """
    file = folder / VALUES_FILE
    if work.train.keeps_best and work.world.leads and file.exists():
        copy_strictly(file, read_tensors(file)[0], _numbered(work))
    if work.train.keeps_best:
        work.world.lead_values(work.adapted.parameters)


def _numbered(work: Work) -> dict[str, Tensor]:
    return {str(place): parameter.detach() for place, parameter in enumerate(work.adapted.parameters)}


def save_adapter(adapted: Adapted, folder: Path) -> None:
    """Replace the adapter in ``folder``, but never a good one by one that holds a NaN."""
    if not all_finite(adapted.parameters):
        raise DivergedError("A trained value is no longer finite: lower optimizer.lr; an adapter saved before is kept")
    with signals.while_closing():
        replace_folder(folder, adapted.save)
