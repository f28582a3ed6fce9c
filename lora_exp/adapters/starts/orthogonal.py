"""Factors in orthogonal halves of the rank's space, as PEFT draws them: both random, and AB is zero all the same.

After https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation. AB is zero up to rounding.
"""

from __future__ import annotations

import torch

from lora_exp.adapters.host import Host
from lora_exp.adapters.starts.registry import start
from lora_exp.adapters.starts.start import Blank, MatrixStart

_SIZE = 0.1  # of the factors' values, PEFT's choice


@start("orthogonal")
class OrthogonalStart(MatrixStart):
    def refusal(self, host: Host, rank: int) -> str | None:
        if rank % 2:
            return f"rank={rank} is odd, and each factor takes one half of it; use an even rank"
        return super().refusal(host, rank)

    def fill(self, blank: Blank) -> None:
        _, A, B = blank.matrices()
        rank = A.shape[1]
        directions, _ = torch.linalg.qr(torch.randn(rank, rank, dtype=A.dtype))
        A.copy_(torch.randn(A.shape[0], rank // 2, dtype=A.dtype) @ directions[0::2] * _SIZE)
        B.copy_(directions[1::2].T @ torch.randn(rank // 2, B.shape[1], dtype=A.dtype) * _SIZE)
