"""Memory of the device that is about to be used: will it fit, and, where it did not, what to do."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.machine.place import Place
from lora_exp.models.kind import model_kind_of
from lora_exp.plan.estimate import GIB, Planner
from lora_exp.plan.show import remedies

log = logging.getLogger(__name__)
# torch on a CPU, cuBLAS, MPS, the C++ and Rust libraries below us, and the system when it has no room for a thread.
_SIGNS = re.compile(
    "DefaultCPUAllocator|an't allocate memory|annot allocate memory|bad_alloc|ALLOC_FAILED|MPS backend out of memory|"
    "Unable to allocate|can't start new thread|failed to map segment"
)
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def check_fits(config: Config, place: Place) -> None:
    """Warn when the plan of ``config`` exceeds the memory of ``place``; with ``plan.strict`` raise ValueError.

    A step is traced only where a bound, which costs a few milliseconds, leaves it open, and never where a plan has to
    read the data. A model that cannot be planned is left to the training, which says better what is wrong with it,
    unless ``plan.strict`` asks for certainty.
    """
    section = config.plan
    reads_data = config.data.new_head or not model_kind_of(config.model).planned_early
    if reads_data or not (section.check or section.strict):
        return
    available = section.gpu_gib or memory_gib(place.device)
    try:
        planner = Planner(config, place, is_told=True)
        if planner.upper_bound() / GIB + section.reserve_gib <= available:
            return
        plan = planner.plan()
    except Exception as error:
        if section.strict:
            raise UserError(f"{config.model.label} cannot be planned ({error}): set plan.strict=false") from error
        log.debug("not planned: %s", error)
        return
    needed = plan.total_bytes / GIB + section.reserve_gib
    if needed <= available:
        return
    message = (
        f"This needs about {needed:.1f} GiB ({section.reserve_gib:g} of them in reserve), and {place.device} has "
        f"{available:.1f}. What helps: {', '.join(remedies(config, 0))}; python -m lora_exp task=plan shows the parts"
    )
    if section.strict:
        raise UserError(f"{message}. plan.strict=false trains all the same")
    log.warning(message)


class OutOfMemoryError(UserError):
    """What ran out of memory, and what to change."""


@contextlib.contextmanager
def memory_errors_explained(config: Config, place: Place) -> Iterator[None]:
    """Raise ``OutOfMemoryError`` for each of the many errors that say so, with what makes ``config`` smaller."""
    try:
        yield
    except Exception as error:
        found = _out_of_memory(error)
        if found is None:
            raise
        traceback.clear_frames(found.__traceback__)  # they hold what filled the memory, which a sweep's next job needs
        reason = re.sub(r"\s+", " ", str(found))[:200] or type(found).__name__
        ways = ", ".join(remedies(replace(config, task="plan"), 0))
        raise OutOfMemoryError(
            f"Out of memory on {place.device} ({reason}). What helps: {ways}; "
            "python -m lora_exp task=plan shows where it goes"
        ) from error


def _out_of_memory(error: BaseException | None) -> BaseException | None:
    """The error, or the one it was raised from, that says that memory ran out."""
    found, cause = None, error
    while cause is not None:
        known = isinstance(cause, (MemoryError, torch.OutOfMemoryError))
        if known or getattr(cause, "errno", None) == errno.ENOMEM or _SIGNS.search(str(cause)):
            found = cause
        cause = cause.__cause__
    return found


def memory_gib(device: torch.device) -> float:
    """The GPU's memory; else what this process may use of the machine's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / GIB
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return min(memory, int(limit) if limit.isdigit() else memory) / GIB
