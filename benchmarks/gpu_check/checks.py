"""What a check is, and how two computations are compared."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

LIMITS = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the norm of what is expected


@dataclass(frozen=True)
class Found:
    """One comparison: ``error`` is the largest of its tensors' relative differences, norm over norm."""

    room: str
    case: str
    error: float
    limit: float
    said: str = ""  # why it could not be computed, or was left out

    @property
    def is_good(self) -> bool:
        return self.error <= self.limit

    def row(self) -> dict[str, object]:
        return asdict(self) | {"is_good": self.is_good}


class LeftOut(Exception):
    """This device or environment cannot run the case; the message says why."""


Case = tuple[str, float, Callable[[], float]]  # name, limit, and what returns the error


def run(room: str, cases: Iterable[Case]) -> Iterator[Found]:
    """Every case, also after one that raised: what it raised is what was found."""
    for name, limit, call in cases:
        try:
            yield Found(room, name, call(), limit)
        except LeftOut as left:
            yield Found(room, name, 0.0, limit, f"left out: {left}")
        except Exception as error:
            traceback.print_exc()
            yield Found(room, name, float("inf"), limit, f"{type(error).__name__}: {error}")


def difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, both in float64 on the CPU; infinite if found is not finite."""
    a, b = found.detach().double().cpu(), expected.detach().double().cpu()
    if a.shape != b.shape or not a.isfinite().all():
        return float("inf")
    norm = b.norm()
    error: float = ((a - b).norm() / norm if norm else a.norm()).item()
    return error


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """The largest of all. Raises KeyError where one side lacks a tensor."""
    if found.keys() != expected.keys():
        raise KeyError(f"one side alone has {sorted(found.keys() ^ expected.keys())}")
    return max(difference(found[name], expected[name]) for name in expected)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
