"""Products of rows with one matrix an expert, by the ways that transformers has for them.

Letters: S rows (pairs of a token and one of its experts) sorted by expert, E experts, in / out a matrix's sides.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_exp.adapters.numerics.autocast import autocast_dtype

log = logging.getLogger(__name__)

_ALIGNED = 16  # bytes, which grouped products ask of every stride
_OTHERWISE = "grouped_mm"  # for an implementation that has kernels of its own


@dataclasses.dataclass(frozen=True)
class Groups:
    """Which rows are whose: `ids` (S,) is each row's expert, ascending. `way` multiplies them, see `WAYS`."""

    ids: Tensor
    experts: int
    way: str = "eager"

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(S, in), (E, in, out) -> (S, out)"""
        return WAYS[self.way](self, x, weight)

    def at(self, rows: Tensor | None) -> Groups:
        """Those of some rows, in ascending order; None: of all."""
        return self if rows is None else Groups(self.ids[rows], self.experts, self.way)

    @functools.cached_property
    def counts(self) -> list[int]:
        """Rows by expert. A device without values (meta) shares them out evenly: the work is the same."""
        if self.ids.is_meta:
            share, more = divmod(len(self.ids), self.experts)
            return [share + (expert < more) for expert in range(self.experts)]
        return torch.bincount(self.ids, minlength=self.experts).tolist()

    @functools.cached_property
    def ends(self) -> Tensor:
        """(E,) where each expert's rows end."""
        return torch.bincount(self.ids, minlength=self.experts).cumsum(0).to(torch.int32)


def looped(groups: Groups, x: Tensor, weight: Tensor) -> Tensor:
    """One product an expert that has rows."""
    # unbind: the gradients of all experts are put together once, not added up in E tensors of the whole stack.
    shares = zip(x.split(groups.counts), weight.unbind(), strict=True)
    parts = [rows @ matrix for rows, matrix in shares if len(rows)]
    return torch.cat(parts) if parts else x.new_zeros(0, weight.shape[2])


def grouped(groups: Groups, x: Tensor, weight: Tensor) -> Tensor:
    """One call for all; a loop where torch's kernel cannot be had."""
    return F.grouped_mm(x, weight, offs=groups.ends) if _can_group(x, weight) else looped(groups, x, weight)


def batched(groups: Groups, x: Tensor, weight: Tensor) -> Tensor:
    """A copy of its matrix for each row: for a few rows, as in decoding."""
    return torch.bmm(x.unsqueeze(1), weight[groups.ids]).squeeze(1)


WAYS: dict[str, Callable[[Groups, Tensor, Tensor], Tensor]] = {
    "eager": looped,
    "grouped_mm": grouped,
    "batched_mm": batched,
}


def way_for(asked: str | None) -> str:
    """The way by which adapted experts run where transformers' `experts_implementation` is `asked`."""
    if asked is None or asked in WAYS:
        return asked or "eager"
    _say_other_way(asked)
    return _OTHERWISE


@functools.cache
def _say_other_way(asked: str) -> None:
    log.warning(
        "experts_implementation=%r has kernels that an adapter cannot follow; adapted experts run as %r, those "
        "without an adapter as asked",
        asked,
        _OTHERWISE,
    )


def _can_group(x: Tensor, weight: Tensor) -> bool:
    if not hasattr(F, "grouped_mm") or x.is_meta or x.dtype != weight.dtype or not len(x):
        return False
    if autocast_dtype(x.device.type) is not None:  # the kernel does not know of it
        return False
    if x.is_cuda:
        fits = x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    else:
        fits = x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)
    sides = (*x.shape[1:], *weight.shape[1:])
    return fits and x.is_contiguous() and all(side * x.element_size() % _ALIGNED == 0 for side in sides)
