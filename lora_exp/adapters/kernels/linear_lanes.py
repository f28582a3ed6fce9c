"""LoRA of several lanes on one linear layer: one batched product a step instead of one for each lane.

A GPU waits longer for a small product to begin than to end. Lanes are slices of the rows, of one size and one after the
other; their factors are stacked, those of a lower rank filled up with zeros, which add exactly nothing. A slice that
goes through the base alone has zeros for factors, so that shapes stay when a lane leaves.

Letters: L lanes, m rows of each, K inputs, N outputs, R the largest rank, c a lane's scale / keep.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_exp.adapters.kernels.terms import Share, as_dtype


class Lanes:
    """Which lane each share is, of how many."""

    __slots__ = ("_count", "_each", "_first", "_places", "_shares")

    def __init__(self, first: int, each: int, count: int, shares: Sequence[Share], places: Sequence[int]) -> None:
        self._first, self._each, self._count, self._shares, self._places = first, each, count, shares, places

    @classmethod
    def of(cls, spans: Sequence[tuple[Share | None, slice | None]]) -> Lanes | None:
        """The lanes of a call, by spans of flat rows (None: the base alone); None where they are not alike: DoRA among
        them, slices of unlike size, or one alone."""
        rows = [span for _, span in spans if span is not None]
        shares = [share for share, _ in spans if share is not None]
        if len(spans) < 2 or len(rows) < len(spans) or any(share.norm is not None for share in shares):
            return None
        each = rows[0].stop - rows[0].start
        if each == 0 or any(span.start != rows[0].start + each * place for place, span in enumerate(rows)):
            return None
        if rows[-1].stop - rows[-1].start != each:
            return None
        places = [place for place, (share, _) in enumerate(spans) if share is not None]
        return cls(rows[0].start, each, len(spans), shares, places)

    def add(self, x: Tensor, out: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """Add c z B to each lane's rows of out (M, N), for x (M, K); returns z (L, m, R). factors: A, B, A, B, …"""
        z = self._low(x, factors)
        self._split(out).baddbmm_(as_dtype(z, out.dtype), self._scaled(factors, out.dtype))
        return z

    def gradients(
        self,
        grad: Tensor,
        x: Tensor | None,
        factors: Sequence[Tensor],
        z: Tensor | None,
        needs: Sequence[bool],
        dx: Tensor | None,
    ) -> list[Tensor | None]:
        """dA, dB of share after share for G = `grad` (M, N), None where `needs` says so; adds mask ∘ (c dz Aᵀ) to dx
        (M, K). Without a kept z it is computed again."""
        G, dz = self._split(grad), None
        if any(needs[::2]) or dx is not None:
            dz = torch.bmm(G, self._scaled(factors, grad.dtype).mT)
        if dx is not None and dz is not None:
            A = self._stack(factors[::2], grad.dtype, 1).mT
            if self._drops:
                self._split(dx).add_(self._dropped(torch.bmm(dz, A)))
            else:
                self._split(dx).baddbmm_(dz, A)
        found: list[Tensor | None] = [None] * len(needs)
        if any(needs[::2]) and dz is not None:
            assert x is not None
            dA = torch.bmm(dz.mT, self._dropped(self._split(as_dtype(x, grad.dtype))))  # (L, R, K), as one share has it
            found[::2] = [lane.T for lane in self._own(dA, factors)]
        if any(needs[1::2]):
            if z is None:
                assert x is not None  # kept wherever z is not
                z = self._low(as_dtype(x, grad.dtype), factors)
            found[1::2] = self._by_scale(self._own(torch.bmm(as_dtype(z, grad.dtype).mT, G), factors))
        return [
            as_dtype(each, factor.dtype).contiguous() if needed and each is not None else None
            for each, factor, needed in zip(found, factors, needs, strict=True)
        ]

    def _low(self, x: Tensor, factors: Sequence[Tensor]) -> Tensor:
        """(L, m, R) z for x (M, K)"""
        return torch.bmm(self._dropped(self._split(x)), self._stack(factors[::2], x.dtype, 1))

    @property
    def _drops(self) -> bool:
        return any(share.p for share in self._shares)

    # Stacks

    def _split(self, rows: Tensor) -> Tensor:
        """(L, m, ...) of (M, ...), a view."""
        return rows[self._first : self._first + self._count * self._each].view(self._count, self._each, -1)

    def _own(self, stacked: Tensor, factors: Sequence[Tensor]) -> list[Tensor]:
        """Of (L, R, ...) each share's, without what filled it up."""
        return [stacked[place, : B.shape[0]] for place, B in zip(self._places, factors[1::2], strict=True)]

    def _scaled(self, factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
        """(L, R, N) c B"""
        return self._stack(self._by_scale(factors[1::2]), dtype, 0)

    def _by_scale(self, each: Sequence[Tensor]) -> list[Tensor]:
        """c times each share's, in one kernel."""
        return list(torch._foreach_mul(list(each), [share.factor for share in self._shares]))

    def _stack(self, given: Sequence[Tensor], dtype: torch.dtype, axis: int) -> Tensor:
        """One matrix a lane, as large as the largest along `axis`, which is the rank's."""
        most = max(factor.shape[axis] for factor in given)
        found: list[Tensor | None] = [None] * self._count
        for place, factor in zip(self._places, given, strict=True):
            missing = most - factor.shape[axis]
            found[place] = F.pad(factor, (0, missing) if axis else (0, 0, 0, missing)) if missing else factor
        stacked = [each for each in found if each is not None]
        if len(stacked) < self._count:  # zeros where no share is
            nothing = torch.zeros_like(stacked[0])
            stacked = [nothing if each is None else each for each in found]
        return as_dtype(torch.stack(stacked), dtype)

    def _dropped(self, lanes: Tensor) -> Tensor:
        """(L, m, K), each lane by its own mask of 0 and 1."""
        if not self._drops:
            return lanes
        found = list(lanes)
        for place, share in zip(self._places, self._shares, strict=True):
            mask = share.mask(lanes[place])
            found[place] = lanes[place] if mask is None else mask.mul_(lanes[place])
        return torch.stack(found)
