"""The frozen layer as variants and kernels see it: its geometry, its own product, its dense weight."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lora_exp.adapters.routing.route import Route
from lora_exp.errors import UserError


class Host(nn.Module):
    """Mixed into a torch layer in front of it. Letters: r rank; A and B have the shapes of `factor_shapes`.

    A kind of layer states its geometry in the methods below `# Geometry`; a base that is no plain float weight
    overrides those below `# The base`.
    """

    layer_type: ClassVar[str]
    made_from: ClassVar[tuple[type[Host], type[nn.Module]] | None] = None  # where the class was made on the fly
    out_axis: ClassVar[int] = 0  # the weight's dimension that counts output features
    rank_axis: ClassVar[int] = 1  # A's dimension that counts the rank, as B's first does
    takes_dropout: ClassVar[bool] = True  # not where inputs are indices
    is_stack: ClassVar[bool] = False  # whether the weight is many in one parameter, and A and B have as many

    compute_dtype: torch.dtype | None = None  # of the base's product; x's own if None
    weight: Tensor  # the torch layer's own parameters
    bias: Any
    route: Route
    kept: dict[str, nn.Parameter]  # the base's own parameters while an adapter is merged in

    @classmethod
    def refusal(cls, module: nn.Module, rank: int) -> str | None:
        """Why this kind of layer cannot adapt `module` at `rank`; None if it can."""
        raise NotImplementedError

    @classmethod
    def largest_rank(cls, module: nn.Module) -> int:
        """The larger side of the weight as a matrix; no rank above it has a meaning."""
        weight: Tensor = module.weight  # type: ignore[assignment]
        outputs = weight.shape[cls.out_axis]
        return max(outputs, weight.numel() // outputs)

    # Geometry

    def factor_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B."""
        raise NotImplementedError

    def empty_factors(self, rank: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        """A and B of zeros, laid out in memory as `peft_factors` needs them to be."""
        shape_A, shape_B = self.factor_shapes(rank)
        return torch.zeros(shape_A, dtype=dtype, device=device), torch.zeros(shape_B, dtype=dtype, device=device)

    def initialise(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Fill zeroed factors in place from the global RNG, one of them staying zero."""
        raise NotImplementedError

    def low_rank(self, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """B(A(x)), computed in x's dtype so that no float32 copy of a bf16 activation is made."""
        raise NotImplementedError

    def linear_forward(self, x: Tensor) -> Tensor:
        """The base layer's output for x without its bias."""
        raise NotImplementedError

    def combine(self, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """AB in the weight's shape."""
        raise NotImplementedError

    def matrices(self, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """W (out, K), A (K, r), B (r, out) with delta = (AB)ᵀ; None where the delta is no single product."""
        return None

    def along_output(self, values: Tensor) -> Tensor:
        """(out,) -> a shape that broadcasts over the layer's output."""
        return values

    def along_weight(self, values: Tensor) -> Tensor:
        """(out,) -> a shape that broadcasts over the weight."""
        return values.view([-1 if axis == self.out_axis else 1 for axis in range(self.dense_weight().dim())])

    # PEFT's view of the factors

    def peft_refusal(self) -> str | None:
        """Why PEFT (0.21) would compute something else from an adapter on this layer; None if it would not."""
        return None

    def peft_factors(self, lora_A: Tensor, lora_B: Tensor) -> dict[str, Tensor]:
        """Views of A and B in PEFT's layout, under its keys."""
        return {"lora_A.weight": lora_A.T, "lora_B.weight": lora_B.T}

    def peft_magnitude(self, magnitude: Tensor) -> Tensor:
        """(out,) in PEFT's layout."""
        return magnitude

    # The base

    def base_forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x)  # the torch layer behind this mixin
        return out

    @property
    def place(self) -> tuple[nn.Module, str]:
        """Whose parameter the weight is, and its key there. Merging puts another one in its place, and keeps it in
        that module's `kept`."""
        return self, "weight"

    def dense_weight(self) -> Tensor:
        """The base weight in floating point, in its own shape, whatever is merged into it now."""
        return self.kept.get("weight", self.weight)

    @property
    def merged_dtype(self) -> torch.dtype:
        """What merged weights are stored in; at least 16 bits."""
        return self.dense_weight().dtype

    def requantised(self, dense: Tensor, like: nn.Parameter) -> nn.Parameter:
        """`dense` stored as the quantised weight `like` is."""
        raise UserError("the base is not quantised, so there is nothing to requantise; merge without it")

    def finish(self, out: Tensor) -> Tensor:
        """What the base layer does after its weight was applied (an embedding's max_norm)."""
        return out

    @property
    def factor_dtype(self) -> torch.dtype:
        """float32 on any base, float64 on a float64 one."""
        return torch.float64 if self.weight.dtype == torch.float64 else torch.float32
