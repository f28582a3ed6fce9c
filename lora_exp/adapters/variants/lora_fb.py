"""One adapter whose B stays as it was drawn and whose A alone trains: LoRA-FA's mirror image (arXiv 2402.16842).

That paper's claim is that B matters more: with A frozen little is lost, with B frozen much. This is the other arm.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from lora_exp.adapters.host import Host
from lora_exp.adapters.variants.lora import LoraAdapter
from lora_exp.adapters.variants.registry import variant


@variant("lora_fb")
class LoraFbAdapter(LoraAdapter):
    """LoRA's formulas and kernels, A zero and B random at first. To PEFT its files are plain LoRA."""

    title: ClassVar[str] = "LoRA, B frozen"
    frozen: ClassVar[tuple[str, ...]] = ("lora_B",)
    fast: ClassVar[tuple[str, ...]] = ()  # nothing is left whose rate would be a multiple of A's
    starts_at_base: ClassVar[bool] = True

    def prepare(self, host: Host) -> None:
        super().prepare(host)
        if self.lora_A.is_meta:
            return
        bound = (self.lora_B.numel() // self.rank) ** -0.5  # LoRA's draw of A, of a layer with in and out exchanged
        with torch.no_grad():
            self.lora_A.zero_()
            self.lora_B.copy_(torch.empty(self.lora_B.shape, dtype=self.lora_B.dtype).uniform_(-bound, bound))
