"""Dropout masks that follow from a seed alone, so that nothing but the seed is kept for backward."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from lora_exp.adapters.numerics.typed_torch import not_compiled

_LEVELS = 1 << 16


def keep_share(p: float) -> float:
    """The probability with which `dropout_mask` keeps an element: 1-p in steps of 2^-16, never 0."""
    return max(1, round((1 - p) * _LEVELS)) / _LEVELS


def dropout_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Bernoulli(keep_share(p)) as 0 and 1 in x's shape and dtype, from a generator of its own; contiguous."""
    mask = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if mask.is_meta or mask.numel() == 0:
        return mask
    if x.device.type != "cpu":
        return mask.bernoulli_(keep_share(p), generator=torch.Generator(device=x.device).manual_seed(seed))
    # One 64-bit number decides four elements; torch's own serial generator takes three times as long for them.
    words = np.random.SFC64(seed).random_raw(-(-mask.numel() // 4))
    drawn = torch.from_numpy(words.view(np.int16))[: mask.numel()].view(x.shape)
    return torch.ge(drawn, _LEVELS // 2 - round(keep_share(p) * _LEVELS), out=mask)


@not_compiled
def dropout_noise(x: Tensor, p: float, seed: int) -> Tensor:
    """`dropout_mask` over its expectation: what x is multiplied with."""
    return dropout_mask(x, p, seed).div_(keep_share(p))


def draw_seed() -> int:
    """A seed from the global random generator."""
    return int(torch.randint(0, 2**62, ()))


def seed_from(*numbers: int) -> int:
    """A seed that follows from all of the numbers."""
    text = ":".join(map(str, numbers))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def distinct_seed(seed: int) -> int:
    """A seed of this process's own where several are seeded alike."""
    return seed_from(seed, own) if (own := rank()) else seed


def rank() -> int:
    """Which process of a distributed run this is: processes that are seeded alike must not share their masks."""
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if is_distributed else 0
