"""How fast this machine multiplies, measured once and kept in the cache, and what follows for a run."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path

import torch

from lora_exp.adapters.numerics.precision import (
    CHOICES,
    NATIVE,
    ONEDNN,
    Answers,
    Rates,
    measure,
    use_answers,
    with_environment,
)
from lora_exp.config import MachineConfig
from lora_exp.machine.cache import cache_root
from lora_exp.machine.processor import device_name

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Precision:
    """A device's measured ``rates`` (FLOP/s), and the ``answers`` in force: measured, or forced."""

    device: torch.device
    rates: Rates
    answers: Answers

    def rate(self, compute: torch.dtype) -> float:
        """FLOP/s of products of ``compute`` as they are made here."""
        if compute.itemsize == 2 and (self.device.type != "cpu" or self.answers.bf16 == NATIVE):
            return self.rates.bfloat16
        return self.rates.onednn if self.device.type == "cpu" and self.answers.float32 == ONEDNN else self.rates.blas

    def tags(self) -> dict[str, str]:
        """What a run is recorded with, and what it takes to repeat it to the bit."""
        rates = {f"machine.gflops_{name}": f"{rate / 1e9:.0f}" for name, rate in dataclasses.asdict(self.rates).items()}
        answers = {f"machine.{name}": answer for name, answer in dataclasses.asdict(self.answers).items()}
        place = {"machine.device": device_name(self.device), "machine.threads": str(torch.get_num_threads())}
        return {**place, **answers, **rates}


def take_precision(section: MachineConfig, device: torch.device) -> Precision:
    """Measure, or read what was measured before, and let this process multiply accordingly.

    ``machine.bf16`` and ``machine.float32`` force an answer, then LORA_EXP_BF16 and LORA_EXP_FLOAT32.
    """
    rates = _known_rates(device)
    found = with_environment(lambda: _cpu_rates(device, rates).answers())
    forced = {name: value for name in CHOICES if (value := getattr(section, name)) != "auto"}
    answers = dataclasses.replace(found, **forced)
    use_answers(answers)
    return Precision(device, rates, answers)


def _cpu_rates(device: torch.device, rates: Rates) -> Rates:
    """The answers are about a CPU's products, whatever the run's device is."""
    return rates if device.type == "cpu" else _known_rates(torch.device("cpu"))


def _known_rates(device: torch.device) -> Rates:
    if device.type not in ("cpu", "cuda"):
        return Rates(0.0, 0.0, 0.0)
    about = {"device": device_name(device), "torch": torch.__version__, "threads": torch.get_num_threads()}
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:20]
    file = cache_root() / "machine" / f"{key}.json"
    if (known := _read(file)) is not None:
        return known
    rates = measure(device)
    log.info(
        f"machine {about['device']}: {rates.float32 / 1e9:,.0f} GFLOP/s in float32, {rates.bfloat16 / 1e9:,.0f} in "
        f"bfloat16 with {about['threads']} threads, measured once and kept in {file}"
    )
    with contextlib.suppress(OSError):  # nowhere to keep it: measured again by the next run
        _keep(file, {**about, "flop_per_s": dataclasses.asdict(rates)})
    return _read(file) or rates


def _read(file: Path) -> Rates | None:
    """None for a file that is missing or damaged, which is then made anew."""
    try:
        known = {name: float(value) for name, value in json.loads(file.read_text())["flop_per_s"].items()}
        rates = Rates(**known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return rates if rates.blas > 0 else None


def _keep(file: Path, content: dict[str, object]) -> None:
    """Whole or not at all; of two processes that measured, the first one's answer holds for both."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        new = Path(folder) / file.name
        new.write_text(json.dumps(content, indent=2) + "\n")
        if _read(file) is None:
            file.unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):
            os.link(new, file)
