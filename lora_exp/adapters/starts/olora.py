"""OLoRA (arXiv 2406.01775): A and B begin as the first r rows and columns of W = QR, so B's rows are orthonormal.

Its product is taken off again, where the paper takes it off W.
"""

from __future__ import annotations

import torch

from lora_exp.adapters.starts.registry import start
from lora_exp.adapters.starts.start import Blank, FactoredStart


@start("olora")
class OloraStart(FactoredStart):
    is_subtracted = True

    def fill(self, blank: Blank) -> None:
        W, A, B = blank.matrices()
        # The first r columns of Q follow from the first r of W alone, and R is QᵀW: no whole factorisation.
        Q, _ = torch.linalg.qr(W[:, : len(B)])
        A.copy_(W.T @ Q)
        B.copy_(Q.T)
