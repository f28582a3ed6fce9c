"""What every start has: a look at the layers that it is asked for, and the filling of one layer's factors.

Letters: r rank; W (out, K) is a layer's weight as a matrix, A (K, r) and B (r, out) its factors, delta = scale * (AB)ᵀ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from lora_exp.adapters.host import Host
from lora_exp.adapters.numerics.autocast import without_autocast
from lora_exp.errors import UserError

ByLayer = Mapping[str, Tensor] | Callable[[str], Tensor]


@dataclasses.dataclass(frozen=True)
class Given:
    """What factors may be made of beside the model, by layer name.

    dense_weights: a quantised base's weights as they were; input_scales: the root mean square (K,) of each input of a
    layer, over data (see `inspection.input_scales`). `fills` is False where a file will bring A and B.
    """

    dense_weights: ByLayer | None = None
    input_scales: ByLayer | None = None
    fills: bool = True

    def value(self, field: str, layer: str) -> Tensor:
        values: ByLayer | None = getattr(self, field)
        if values is None:
            raise UserError(f"this start asks for {field}; pass given=Given({field}={{layer name: tensor}})")
        if callable(values):
            return values(layer)
        if layer not in values:
            raise UserError(f"{field} has nothing for {layer}; give one for every adapted layer")
        return values[layer]


NOTHING = Given()


@dataclasses.dataclass(frozen=True)
class Blank:
    """A layer's factors before they begin: zeros in the host's own shapes, and what they may be made from."""

    host: Host
    lora_A: Tensor
    lora_B: Tensor
    scale: float
    layer: str
    given: Given

    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """W in the factors' dtype, and views of A and B to write to."""
        found = self.host.matrices(self.lora_A, self.lora_B)
        assert found is not None, "a start looks at `refusal` first"
        weight, A, B = found
        return weight.to(self.lora_A.dtype), A, B

    def asked(self, field: str, shape: torch.Size) -> Tensor:
        """What was given of `field` for the layer, which must have this shape."""
        value = self.given.value(field, self.layer)
        if value.shape != shape:
            raise UserError(f"{field} gave {tuple(value.shape)} for {self.layer}, where it must be {tuple(shape)}")
        return value


class Start:
    """How A and B begin; a subclass in a file of its own, under `@start(name)`, is one. Options are keyword-only.

    Where AB is zero at first, nothing else is to say. A start that makes another product says what it is for: taken
    off again (`is_subtracted`), so that training begins at the base, which is never changed, and the layer computes
    scale * (AB - A0 B0); or left in, as what mends a quantised base.
    """

    name: ClassVar[str]
    is_subtracted: ClassVar[bool] = False
    starts_at_base: ClassVar[bool] = False  # in every bit; one that is subtracted always does
    rows: int = 0  # of data that it would have the base see, for `Given.input_scales`

    def check(self, hosts: Mapping[str, Host], ranks: Mapping[str, int]) -> None:
        """Raise UserError for the first layer that cannot begin so; asked before any does."""
        for layer, host in hosts.items():
            if reason := self._sparse(host) or self.refusal(host, ranks[layer]):
                raise UserError(f"start={self.name!r} is not for {layer or 'this layer'}: {reason}")

    def _sparse(self, host: Host) -> str | None:
        if not (self.is_subtracted and getattr(host, "sparse", False)):
            return None
        return "its gradients are sparse, which the factors of two products cannot have; build it with sparse=False"

    def refusal(self, host: Host, rank: int) -> str | None:
        """Why a host cannot begin so; None if it can. On the meta device alone shapes are known."""
        return None

    def fill(self, blank: Blank) -> None:
        """Write A and B in place; numbers are drawn from the global RNG."""
        raise NotImplementedError


class MatrixStart(Start):
    """A start for layers whose delta is one product of matrices."""

    def refusal(self, host: Host, rank: int) -> str | None:
        A, B = (torch.empty(shape, device="meta") for shape in host.factor_shapes(rank))
        if host.matrices(A, B) is None:
            return "its delta is not one product of two matrices; use start='default', or other targets"
        return None


class FactoredStart(MatrixStart):
    """A start that takes r directions of a matrix of W's shape, which must have as many."""

    def refusal(self, host: Host, rank: int) -> str | None:
        return super().refusal(host, rank) or _too_few(host, rank)


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What one adapter is told of how it begins in one layer."""

    start: Start
    layer: str = ""
    given: Given = NOTHING

    @torch.no_grad()
    def fill(self, host: Host, lora_A: Tensor, lora_B: Tensor, scale: float) -> None:
        if self.given.fills:
            with without_autocast(lora_A.device.type):
                self.start.fill(Blank(host, lora_A, lora_B, scale, self.layer, self.given))


def _too_few(host: Host, rank: int) -> str | None:
    shape_A, shape_B = host.factor_shapes(rank)
    inputs, outputs = (torch.Size(shape).numel() // rank for shape in (shape_A, shape_B))
    if rank <= (most := min(inputs, outputs)):
        return None
    return f"rank={rank} is more than the {most} directions of its weight; use rank={most} or less (see rank_pattern)"
