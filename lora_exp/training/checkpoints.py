"""A training's state on disk: a folder a checkpoint, which is there whole or not at all, and is checked when read.

``checkpoints/step_00000012`` holds ``facts.json`` (for a person and for the decision to go on from it), ``state.json``
and ``tensors.safetensors`` (the state itself) and ``sha256.json`` (the digest of each file).
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_exp.errors import RefusedError, UserError
from lora_exp.machine.cache import file_sha256
from lora_exp.training.nested import joined, parted

log = logging.getLogger(__name__)
FOLDER = "checkpoints"
_FACTS, _STATE, _TENSORS, _DIGESTS = "facts.json", "state.json", "tensors.safetensors", "sha256.json"
_NAME = re.compile(r"step_(\d{8,})")


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was whole when it was read. ``facts`` are JSON."""

    folder: Path
    step: int
    facts: Mapping[str, Any]

    def state(self) -> Mapping[str, Any]:
        """What ``Checkpoints.save`` was given, on the CPU: read anew, as it is too large to be kept beside a model."""
        plain: Mapping[str, Any] = joined(
            json.loads((self.folder / _STATE).read_text()), load_file(self.folder / _TENSORS)
        )
        return plain


class Checkpoints:
    """Those in one folder: the last ``keep`` and the best stay. ``facts()`` is asked at each save."""

    def __init__(self, folder: Path, keep: int = 2, facts: Callable[[], Mapping[str, Any]] = dict) -> None:
        self.folder, self._keep, self._facts = folder, keep, facts

    def save(self, step: int, state: Mapping[str, Any], best: int | None = None, is_last: bool = False) -> None:
        """Write a checkpoint; a failure, or an end of the process, leaves those before it as they were.

        ``state``: nested dicts, lists and tuples of tensors and plain values. ``best``: the step of the best so far.
        ``is_last``: whether the training ends here.
        """
        target = self.folder / f"step_{step:08d}"
        writing, old = self._hidden(target, "writing"), self._hidden(target, "old")
        self._sweep()
        try:
            writing.mkdir(parents=True)
            _write(writing, {"step": step, "is_last": is_last, **self._facts()}, state)
        except BaseException:
            shutil.rmtree(writing, ignore_errors=True)  # on a full disk others need the room, too
            raise
        if target.exists():  # one that could not be gone on from
            target.rename(old)
        writing.rename(target)
        _sync(self.folder)
        self._forget({best, *self.steps()[-max(self._keep, 1) :]})

    def steps(self) -> list[int]:
        """The steps of those that are there, whole or not, in order."""
        names = [path.name for path in self.folder.iterdir()] if self.folder.is_dir() else []
        return sorted(int(found[1]) for name in names if (found := _NAME.fullmatch(name)))

    def is_over(self) -> bool:
        """Whether the newest is its training's end; one that cannot be read is none."""
        try:
            return bool(read(self.folder / f"step_{self.steps()[-1]:08d}").facts["is_last"])
        except (IndexError, DamagedError):
            return False

    def newest(self, problem: Callable[[Checkpoint], str | None] = lambda checkpoint: None) -> Checkpoint | None:
        """The newest that is whole and has no ``problem``; None if there is none at all. Passing one over is said.

        Raises RefusedError if there are some, of which none will do.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                found = read(self.folder / f"step_{step:08d}")
                if reason := problem(found):
                    raise DamagedError(reason)
            except DamagedError as error:
                reasons.append(f"step {step}: {error}")
                log.warning(f"The checkpoint of step {step} is passed over ({error}): the one before it is taken")
                continue
            return found
        if reasons:
            raise RefusedError(
                f"No checkpoint in {self.folder} can be gone on from ({'; '.join(reasons)}): "
                "copy it anew if there is a copy, or start anew in another folder"
            )
        return None

    def forget_after(self, step: int) -> None:
        """Remove those of later steps, which could not be gone on from: the training will get there again."""
        self._forget({known for known in self.steps() if known <= step})

    def _forget(self, kept: set[int | None]) -> None:
        for step in set(self.steps()) - kept:
            gone = self.folder / f"step_{step:08d}"
            gone.rename(self._hidden(gone, "old"))  # so that half of one is never seen under its name
        self._sweep()

    def _sweep(self) -> None:
        """Remove what an earlier end of a process left half written or half removed."""
        for stage in ("writing", "old"):
            for rest in self.folder.glob(f".step_*.{stage}"):
                shutil.rmtree(rest, ignore_errors=True)

    def _hidden(self, target: Path, stage: str) -> Path:
        return target.with_name(f".{target.name}.{stage}")


def read(folder: Path) -> Checkpoint:
    """The checkpoint in ``folder``. Raises ``DamagedError`` for one that is not what was written."""
    try:
        digests = json.loads((folder / _DIGESTS).read_text())
        for name in (_FACTS, _STATE, _TENSORS):
            if file_sha256(folder / name) != digests[name]:
                raise DamagedError(f"{name} is not what was written")
        facts = json.loads((folder / _FACTS).read_text())
        return Checkpoint(folder, int(facts["step"]), facts)
    except FileNotFoundError as error:
        raise DamagedError(f"{Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        if isinstance(error, DamagedError):
            raise
        raise DamagedError(f"it cannot be read: {error}") from error


def _write(folder: Path, facts: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    plain, tensors = parted(state)
    (folder / _FACTS).write_text(json.dumps(facts, indent=2) + "\n")
    (folder / _STATE).write_text(json.dumps(plain))
    save_file(_apart(tensors), folder / _TENSORS)
    (folder / _TENSORS).chmod((folder / _STATE).stat().st_mode & 0o777)  # safetensors makes it for the owner alone
    for name in (_FACTS, _STATE, _TENSORS):
        _sync(folder / name)
    digests = {name: file_sha256(folder / name) for name in (_FACTS, _STATE, _TENSORS)}
    (folder / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n")
    _sync(folder / _DIGESTS)
    _sync(folder)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none with memory of another's: what several parameters share is written for each."""
    found: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        own = tensor.detach().to("cpu").contiguous()
        own = own.clone() if own.untyped_storage().data_ptr() in taken else own
        taken.add(own.untyped_storage().data_ptr())
        found[name] = own
    return found


def _sync(path: Path) -> None:
    """Have the system write a file, or a folder's list of names, to the disk now."""
    if path.is_dir() and os.name == "nt":  # Windows opens no folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
