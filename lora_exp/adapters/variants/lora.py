"""One plain LoRA adapter on one layer (arXiv 2106.09685).

Letters: r rank; A and B have the shapes that the layer's kind states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.config import check_factors, scaling_factor
from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.terms import Terms
from lora_exp.adapters.numerics.autocast import without_autocast
from lora_exp.adapters.numerics.dropout import dropout_noise
from lora_exp.adapters.variants.registry import variant

_FORMULA = ("output", "add_to", "low_rank", "dropped")  # the plain path, which terms must agree with


@variant("lora")
class LoraAdapter(nn.Module):
    """Factors A and B, and how they change a host's output and weight.

    A variant is a subclass in a file of its own, under `@variant(name)`. It overrides `prepare`, `add_to` and `merged`,
    and `terms` if a kernel can run it: a class that changes the formula without stating terms of its own is run by
    its plain formulas. Options are keyword-only arguments of its constructor.
    """

    variant: ClassVar[str]
    _states_terms: ClassVar[bool] = True
    peft_flags: ClassVar[Mapping[str, object]] = {}  # what adapter_config.json says of it beside LoRA's fields

    lora_A: nn.Parameter
    lora_B: nn.Parameter

    def __init__(
        self, name: str, rank: int, alpha: float, dropout: float, use_rslora: bool, layer_key: int = 0
    ) -> None:
        super().__init__()
        check_factors(rank, alpha, dropout)
        self.name = name
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.use_rslora = use_rslora
        self.scale = scaling_factor(rank, alpha, use_rslora)
        self.layer_key = layer_key

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._states_terms = _states_terms(cls)

    def prepare(self, host: Host) -> None:
        """Make this adapter's parameters for `layer`, such that its output does not change yet."""
        device, dtype = host.weight.device, host.factor_dtype
        shape_A, shape_B = host.factor_shapes(self.rank)
        # Drawn on the CPU whatever the layer's device, so that a seed gives the same adapter everywhere.
        source = device if device.type == "meta" else torch.device("cpu")
        factors = [torch.zeros(shape, dtype=dtype, device=source) for shape in (shape_A, shape_B)]
        if device.type != "meta":
            host.initialise(*factors)
        self.lora_A, self.lora_B = (nn.Parameter(factor.to(device)) for factor in factors)

    def base_loaded(self, host: Host) -> None:
        """Called when other base weights were loaded into `layer`."""

    def terms(self, host: Host) -> Terms | None:
        """What a kernel runs a call by; None: by the plain formulas."""
        seed = functools.partial(host.route.mask_seed, self.name, self.layer_key)
        return Terms(self.lora_A, self.lora_B, self.scale, self.dropout if self.drops else 0.0, seed)

    def kernel_terms(self, host: Host) -> Terms | None:
        """`terms`, unless a class below the one that states them has changed the formula."""
        return self.terms(host) if self._states_terms else None

    def output(self, host: Host, x: Tensor) -> Tensor:
        """The adapted layer's output for x: the plain path that the kernels are compared with."""
        return self.add_to(host, x, host.base_forward(x))

    def add_to(self, host: Host, x: Tensor, base: Tensor) -> Tensor:
        """base + scale * B(A(drop(x))), where base is the frozen layer's output for x."""
        return base + self.low_rank(host, self.dropped(host, x))

    def low_rank(self, host: Host, x: Tensor) -> Tensor:
        """scale * B(A(x)), in the shape of the layer's output; A@B is never formed."""
        return host.low_rank(x, self.lora_A, self.lora_B) * self.scale

    def dropped(self, host: Host, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if torch.jit.is_tracing():  # a trace would keep one mask for ever
            return F.dropout(x, self.dropout)
        return x * dropout_noise(x, self.dropout, host.route.mask_seed(self.name, self.layer_key))

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def delta_weight(self, host: Host) -> Tensor:
        """scale * AB in the base weight's shape, in the factors' dtype (float32)."""
        with without_autocast(self.lora_A.device.type):
            return host.combine(self.lora_A, self.lora_B) * self.scale

    def merged(self, host: Host) -> Tensor:
        """W + delta_weight, accumulated in the factors' dtype."""
        return host.dense_weight().to(self.lora_A.dtype) + self.delta_weight(host)

    def peft_tensors(self, host: Host) -> dict[str, Tensor]:
        """What is trained here in PEFT's layout, as views, under PEFT's keys."""
        return host.peft_factors(self.lora_A.detach(), self.lora_B.detach())

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:.6g}, dropout={self.dropout}"


def _states_terms(kind: type) -> bool:
    """Whether no class below the one that states the terms has changed the formula."""
    owners = kind.__mro__
    stated = next(i for i, owner in enumerate(owners) if "terms" in vars(owner))
    return all("terms" in vars(owner) or not any(key in vars(owner) for key in _FORMULA) for owner in owners[:stated])
