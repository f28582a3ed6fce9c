"""One DoRA adapter on one layer: weight-decomposed low-rank adaptation (arXiv 2402.09353).

W' = m * (W + delta) / ||W + delta||, one magnitude m and one norm for each output feature of W.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from lora_exp.adapters.host import Host
from lora_exp.adapters.kernels.terms import Terms
from lora_exp.adapters.numerics.reference import fused_allowed
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant
from lora_exp.adapters.variants.weight_norm import NormCache


@variant("dora")
class DoraAdapter(LoraAdapter):
    """`magnitude` (out,) starts as the norm of the loaded weight, so that nothing changes at first."""

    fast: ClassVar[tuple[str, ...]] = ("lora_B", "magnitude")
    title: ClassVar[str] = "DoRA"
    peft_flags: ClassVar[Mapping[str, object]] = {"use_dora": True}
    takes_starts: ClassVar[bool] = True
    peft_trains: ClassVar[bool] = True
    magnitude: nn.Parameter

    def __init__(
        self,
        name: str,
        rank: int,
        alpha: float,
        dropout: float,
        use_rslora: bool,
        layer_key: int = 0,
        *,
        detach_norm: bool = True,
    ) -> None:
        super().__init__(name, rank, alpha, dropout, use_rslora, layer_key)
        self.detach_norm = detach_norm
        self._norms = NormCache()

    def prepare(self, host: Host) -> None:
        super().prepare(host)
        with torch.no_grad():
            self.magnitude = nn.Parameter(self.constant_norm(host).clone())

    def base_loaded(self, host: Host) -> None:
        # An untrained adapter keeps meaning "no change" when other base weights come in.
        if not self.lora_A.is_meta and self.is_untrained():
            with torch.no_grad():
                self.magnitude.copy_(self.constant_norm(host))

    def terms(self, host: Host) -> Terms | None:
        terms = super().terms(host) if self.detach_norm else None
        if terms is not None:
            terms.magnitude, terms.norm = self.magnitude, self.constant_norm(host)
        return terms

    def peft_tensors(self, host: Host) -> dict[str, Tensor]:
        return {**super().peft_tensors(host), "lora_magnitude_vector": host.peft_magnitude(self.magnitude.detach())}

    def add_to(self, host: Host, x: Tensor, base: Tensor) -> Tensor:
        ratio = self.ratio(host)
        if self.drops:
            # The whole product sees the dropped input, as in PEFT; base keeps only its share of one.
            x = self.dropped(host, x)
            plain = host.linear_forward(x)
        else:
            bias = getattr(host, "bias", None)
            plain = base if bias is None else base - host.along_output(bias)
        change = host.along_output((ratio - 1).to(base.dtype)) * plain
        return base + change + host.along_output(ratio.to(base.dtype)) * self.low_rank(host, x)

    def merged(self, host: Host) -> Tensor:
        ratio = self.magnitude / self.weight_norm(host)
        return super().merged(host) * host.along_weight(ratio)

    def ratio(self, host: Host) -> Tensor:
        """(out,) m / ||W + delta||; the norm is a constant to the gradient (§4.3) unless asked otherwise."""
        if not self.detach_norm:
            return self.magnitude / self.weight_norm(host)
        return self.magnitude / self.constant_norm(host)

    def constant_norm(self, host: Host) -> Tensor:
        """(out,) the norm without a gradient, kept as long as what it follows from."""
        can_factor = host.matrices(self.lora_A, self.lora_B) is not None and not self.lora_A.is_meta
        if can_factor and fused_allowed():
            kept = [self.lora_A, self.lora_B, *(start for start in (self.start_A, self.start_B) if start is not None)]
            return self._norms.norm(host, kept, lambda: self.factors(host), self.scale)
        with torch.no_grad():
            return self.weight_norm(host)

    def weight_norm(self, host: Host) -> Tensor:
        """(out,) ||W + delta||, in the factors' dtype (float32); never zero, as a dead row has m = 0."""
        weight = LoraAdapter.merged(self, host)
        others = [axis for axis in range(weight.dim()) if axis != host.out_axis]
        norm = torch.linalg.vector_norm(weight, dim=others)
        alive: Tensor = norm.clamp_min(torch.finfo(norm.dtype).tiny)
        return alive
