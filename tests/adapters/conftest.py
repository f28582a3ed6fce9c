"""Tiny models and an independent PEFT twin of each."""

from __future__ import annotations

import pytest
import torch
from torch import nn


class TinyNet(nn.Module):
    """Embedding, two named projections, a norm and a head: enough names to target."""

    def __init__(self, vocab: int = 11, width: int = 16) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(TinyBlock(width) for _ in range(2))
        self.lm_head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        h = self.embed(tokens)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(h)


class TinyBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width, bias=False)

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        return h + self.v_proj(torch.tanh(self.q_proj(self.norm(h))))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def tiny() -> TinyNet:
    return TinyNet()


@pytest.fixture
def make_tiny() -> type[TinyNet]:
    return TinyNet


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 11, (4, 5))
