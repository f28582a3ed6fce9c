"""An export in its real runtime, in a process that knows nothing of the one that wrote it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save_file

from lora_exp.adapters.files.safetensors import read_tensors
from lora_exp.errors import UserError
from lora_exp.export.format import Format, Tolerance, formats
from lora_exp.export.reference import Figures, Reference, compare
from lora_exp.machine import signals

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_READING = "lora_exp.export.reading"
_LOOK_S = 0.05


class RuntimeRefusedError(UserError):
    """The runtime does not read what was written. ``trace``: what it said, in full."""

    def __init__(self, message: str, trace: str) -> None:
        super().__init__(message)
        self.trace = trace


def read_again(
    name: str,
    folder: Path,
    reference: Reference,
    base: Path | None,
    device: str,
    plugins: Sequence[str] = (),
    within: Path | None = None,
) -> Figures:
    """How far the answers of the export in ``folder`` are from ``reference``.

    ``within``: where the two processes' files lie meanwhile, for a folder that is cleared away should this process be
    killed; the system's temporary folder if it is None.

    Raises ``RuntimeRefusedError`` if its runtime does not load it, UserError if it answers to something else.
    """
    kind = formats[name]()
    with tempfile.TemporaryDirectory(prefix=".lora_exp_reading_", dir=within) as place:
        question, answer = Path(place) / "question.safetensors", Path(place) / "answer.safetensors"
        save_file({"tokens": reference.tokens.contiguous()}, question)
        order = {
            "format": name, "folder": str(folder), "question": str(question), "answer": str(answer),
            "base": str(base) if base is not None else None, "device": device, "plugins": list(plugins),
        }  # fmt: skip
        _run(kind, order)
        logits = read_tensors(answer)[0]["logits"]
    return compare(reference, logits, kind.log_probabilities)


def check_within(kind: Format, figures: Figures, tolerance: Tolerance) -> None:
    """Raise UserError, with both figures, for answers that are too far off."""
    if figures.within(tolerance):
        return
    raise UserError(
        f"{kind.runtime} answers otherwise than the trained model: {in_words(kind, figures)}, where "
        f"{tolerance.max_logit:g} and {tolerance.max_kl:g} are let through. Nothing was exported: choose a more exact "
        "export.dtype, export.type or export.quantise, or let more through by export.max_logit and export.max_kl"
    )


def in_words(kind: Format, figures: Figures) -> str:
    return f"largest difference of {compared(kind)} {figures.max_logit:.3g}, mean KL {figures.mean_kl:.3g} nats"


def compared(kind: Format) -> str:
    return "a log-probability" if kind.log_probabilities else "a logit"


def _run(kind: Format, order: Mapping[str, object]) -> None:
    """The child's end, however it comes; it ends with this process's wish to end."""
    home = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(part for part in (home, os.environ.get("PYTHONPATH", "")) if part)
    environment = {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "MLFLOW_TRACKING_URI": ""}
    command = [sys.executable, "-m", _READING, json.dumps(order)]
    with tempfile.TemporaryFile("w+") as said:
        # It ends when its stdin does: with this process, also where that is killed.
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said, env=environment) as child:
            try:
                while child.poll() is None:
                    signals.obey()
                    time.sleep(_LOOK_S)
            finally:
                if child.poll() is None:
                    child.kill()
        said.seek(0)
        text = said.read()
    if child.returncode:
        reason = next((line for line in reversed(text.splitlines()) if line.strip()), f"exit code {child.returncode}")
        raise RuntimeRefusedError(f"{kind.runtime} does not read what was written ({reason.strip()[:300]})", text)
