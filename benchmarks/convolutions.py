"""Adapted convolutions and embeddings: ResNet's and EfficientNet's shapes, and a language model's table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .pairs import Holder, Setup

BATCH, TOKENS = 4, 512
SHAPES = [  # C_in, C_out, kernel, stride, size of the image
    (64, 64, 3, 1, 28),
    (128, 128, 3, 1, 14),
    (64, 128, 3, 2, 28),
    (96, 24, 1, 1, 56),
    (32, 192, 1, 1, 28),
]
Cell = tuple[str, str, Setup, nn.Module, Tensor]


def cells(quick: bool) -> Iterator[Cell]:
    """Group, size, what is asked for, the layer and its input."""
    yield from _embeddings(quick)
    for dora, dropout, rank in itertools.product((False, True), (0.0, 0.05), [8] if quick else [8, 64]):
        for shape in SHAPES[:1] if quick else SHAPES:
            if rank <= min(shape[:2]):
                yield _convolution(Setup(rank, dropout, dora), *shape)


def _embeddings(quick: bool) -> Iterator[Cell]:
    for dora in (False,) if quick else (False, True):
        tokens, table = torch.randint(0, 49152, (1, TOKENS)), Holder(nn.Embedding(49152, 576))
        setup = Setup(dora=dora)
        yield f"{_kind(setup)} Embedding", "49152×576", setup, table, tokens


def _convolution(setup: Setup, C_in: int, C_out: int, kernel: int, stride: int, size: int) -> Cell:
    layer = Holder(nn.Conv2d(C_in, C_out, kernel, stride, padding=kernel // 2, bias=False))
    x = torch.randn(BATCH, C_in, size, size, requires_grad=True)
    title = f"{C_in}→{C_out} {kernel}×{kernel}{f' stride {stride}' * (stride > 1)} on {size}²"
    return f"{_kind(setup)} Conv2d dropout {setup.dropout:g}", title, setup, layer, x


def _kind(setup: Setup) -> str:
    return "DoRA" if setup.dora else "LoRA"
