"""LoRA's own start (arXiv 2106.09685 §4.1): one factor random, the other zero, as the kind of layer has them."""

from __future__ import annotations

from lora_exp.adapters.starts.registry import start
from lora_exp.adapters.starts.start import Blank, Start


@start("default")
class DefaultStart(Start):
    starts_at_base = True

    def fill(self, blank: Blank) -> None:
        blank.host.initialise(blank.lora_A, blank.lora_B)
