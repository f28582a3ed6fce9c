"""One LoRA-FA adapter on one layer: A stays as it was drawn, B alone trains (arXiv 2308.03303).

dB = c (x A)ᵀ G needs the narrow x A, so that a layer's input need not be retained for its backward pass (§3.2).
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lora_exp.adapters.host import Host
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant


@variant("lora_fa")
class LoraFaAdapter(LoraAdapter):
    """LoRA's formulas and kernels. To PEFT its files are plain LoRA; that A is frozen stands in our notes."""

    title: ClassVar[str] = "LoRA-FA"
    frozen: ClassVar[tuple[str, ...]] = ("lora_A",)
    takes_starts: ClassVar[bool] = True
    takes_stacks: ClassVar[bool] = True
    starts_at_base: ClassVar[bool] = True

    def prepare(self, host: Host) -> None:
        super().prepare(host)
        if self.lora_A.is_meta or self.lora_A.any():
            return
        with torch.no_grad():  # an embedding's A starts at zero: frozen there, nothing would ever train
            self.lora_A.copy_(torch.randn(self.lora_A.shape, dtype=self.lora_A.dtype))
            self.lora_B.zero_()
