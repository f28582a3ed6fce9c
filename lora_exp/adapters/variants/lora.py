"""One plain LoRA adapter on one layer (arXiv 2106.09685).

Letters: r rank; A and B have the shapes that the layer's kind states.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_exp.adapters.config import check_factors, scaling_factor
from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.terms import Terms
from lora_exp.adapters.numerics.autocast import without_autocast
from lora_exp.adapters.numerics.dropout import dropout_noise
from lora_exp.adapters.starts.default import DefaultStart
from lora_exp.adapters.starts.start import Beginning
from lora_exp.adapters.variants.peft_format import PeftFormat
from lora_exp.adapters.variants.registry import variant

_DEFAULT = Beginning(DefaultStart())
AT_START = ".start"  # behind a file key of A or B, that of A0 or B0
_FORMULA = ("output", "add_to", "low_rank", "dropped")  # the plain path, which terms must agree with


@variant("lora")
class LoraAdapter(nn.Module):
    """Factors A and B, and how they change a host's output and weight.

    A variant is a subclass in a file of its own, under `@variant(name)`. It overrides `prepare`, `add_to` and `merged`,
    and `terms` if a kernel can run it: a class that changes the formula without stating terms of its own is run by
    its plain formulas. One whose A and B are computed overrides `factors` alone. Options are keyword-only arguments
    of its constructor.

    A class says itself, by `takes_starts`, that A and B may begin otherwise than `prepare` alone would have it: its
    formulas then go by `factors`, as a start's product may have to be taken off again.
    """

    variant: ClassVar[str]
    _states_terms: ClassVar[bool] = True
    frozen: ClassVar[tuple[str, ...]] = ()  # which of its parameters never train
    fast: ClassVar[tuple[str, ...]] = ("lora_B",)  # what LoRA+ (arXiv 2402.12354) trains at a higher rate
    title: ClassVar[str] = "LoRA"
    peft_format: ClassVar[PeftFormat] = PeftFormat()
    peft_flags: ClassVar[Mapping[str, object]] = {}  # what adapter_config.json says of it beside LoRA's fields
    takes_starts: ClassVar[bool] = True
    peft_trains: ClassVar[bool] = True  # whether PEFT, told these flags, trains the same; a subclass says so itself
    takes_stacks: ClassVar[bool] = True  # of weights; a subclass that does too says so itself
    starts_at_base: ClassVar[bool] = True  # in every bit, where AB is zero; a subclass that does too says so itself

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    start_A: Tensor | None  # A0 and B0, where the start's product is taken off again
    start_B: Tensor | None

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
        self.beginning = _DEFAULT
        self.register_buffer("start_A", None)
        self.register_buffer("start_B", None)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls._states_terms = _states_terms(cls)

    def prepare(self, host: Host) -> None:
        """Make this adapter's parameters for `layer`, such that its output does not change yet."""
        device, dtype = host.weight.device, host.factor_dtype
        # Drawn on the CPU whatever the layer's device, so that a seed gives the same adapter everywhere.
        source = device if device.type == "meta" else torch.device("cpu")
        lora_A, lora_B = host.empty_factors(self.rank, dtype, source)
        beginning, self.beginning = self.beginning, _DEFAULT  # it may hold open files
        if device.type != "meta":
            beginning.fill(host, lora_A, lora_B, self.scale)
        self.lora_A, self.lora_B = nn.Parameter(lora_A.to(device)), nn.Parameter(lora_B.to(device))
        if beginning.start.is_subtracted:
            self.start_A, self.start_B = self.lora_A.detach().clone(), self.lora_B.detach().clone()
        for name in self.frozen:
            self.get_parameter(name).requires_grad_(False)

    @classmethod
    def share(cls, placed: Sequence[tuple[Host, LoraAdapter]]) -> None:
        """Called before `prepare` with all layers of a new adapter: what these have in common is made here."""

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Its parameters by name, those left out that are frozen."""
        return {name: value for name, value in self.named_parameters() if name not in self.frozen}

    def base_loaded(self, host: Host) -> None:
        """Called when other base weights were loaded into `layer`."""

    def terms(self, host: Host) -> Terms | None:
        """What a kernel runs a call by; None: by the plain formulas."""
        seed = functools.partial(host.route.mask_seed, self.name, self.layer_key)
        return Terms(*self.factors(host), self.scale, self.dropout if self.drops else 0.0, seed)

    def kernel_terms(self, host: Host) -> Terms | None:
        """`terms`, unless a class below the one that states them has changed the formula."""
        return self.terms(host) if self._states_terms else None

    def factors(self, host: Host) -> tuple[Tensor, Tensor]:
        """A and B of the change: those that are trained, or where a start is taken off again twice as many.

        AB - A0 B0 is (A - A0) B + A0 (B - B0), of small factors times large ones: exactly zero at the start, and in 16
        bits the difference of two large products would drown it.
        """
        if self.start_A is None or self.start_B is None:
            return self.lora_A, self.lora_B
        A = torch.cat([self.lora_A - self.start_A, self.start_A], host.rank_axis)
        return A, torch.cat([self.lora_B, self.lora_B - self.start_B])

    def is_untrained(self) -> bool:
        """Whether the factors change nothing yet."""
        if self.start_A is None or self.start_B is None:
            return not (self.lora_A.any() and self.lora_B.any())
        return torch.equal(self.lora_A, self.start_A) and torch.equal(self.lora_B, self.start_B)

    def output(self, host: Host, x: Tensor) -> Tensor:
        """The adapted layer's output for x: the plain path that the kernels are compared with."""
        return self.add_to(host, x, host.base_forward(x))

    def add_to(self, host: Host, x: Tensor, base: Tensor) -> Tensor:
        """base + scale * B(A(drop(x))), where base is the frozen layer's output for x."""
        return base + self.low_rank(host, self.dropped(host, x))

    def low_rank(self, host: Host, x: Tensor) -> Tensor:
        """scale * B(A(x)), in the shape of the layer's output; A@B is never formed."""
        return host.low_rank(x, *self.factors(host)) * self.scale

    def dropped(self, host: Host, x: Tensor) -> Tensor:
        if not self.drops:
            return x
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]  # a trace would keep one mask for ever
            return F.dropout(x, self.dropout)
        return x * dropout_noise(x, self.dropout, host.route.mask_seed(self.name, self.layer_key))

    @property
    def drops(self) -> bool:
        return self.training and self.dropout > 0

    def delta_weight(self, host: Host) -> Tensor:
        """scale * AB in the base weight's shape, in the factors' dtype (float32)."""
        with without_autocast(host.weight.device.type):
            return host.combine(*self.factors(host)) * self.scale

    def merged(self, host: Host) -> Tensor:
        """W + delta_weight, accumulated in the factors' dtype."""
        delta = self.delta_weight(host)
        return host.dense_weight().to(delta.dtype) + delta

    def peft_tensors(self, host: Host) -> dict[str, Tensor]:
        """What a file holds of this in PEFT's layout, as views, under PEFT's keys; A0 and B0 as `key.start`."""
        found = host.peft_factors(self.lora_A.detach(), self.lora_B.detach())
        if self.start_A is None or self.start_B is None:
            return found
        return found | {f"{key}{AT_START}": view for key, view in host.peft_factors(self.start_A, self.start_B).items()}

    def extra_repr(self) -> str:
        return f"rank={self.rank}, alpha={self.alpha}, scale={self.scale:.6g}, dropout={self.dropout}"


def _states_terms(kind: type) -> bool:
    """Whether no class below the one that states the terms has changed the formula."""
    owners = kind.__mro__
    stated = next(i for i, owner in enumerate(owners) if "terms" in vars(owner))
    return all("terms" in vars(owner) or not any(key in vars(owner) for key in _FORMULA) for owner in owners[:stated])
