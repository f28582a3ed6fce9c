"""Which forward pass a layer call belongs to, also when gradient checkpointing replays the layer.

torch.utils.checkpoint runs a block a second time during backward, possibly after other forward passes,
another route or another active adapter. All it restores is the global RNG state. That state carries the
generator's initial seed, a number that no sampling reads; for the length of a pass we write the pass's
number into it, so that a replayed layer finds the number of the pass that it repeats.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator

import torch

_TAG = 0x4C6F5241  # "LoRA", in the upper half of the 64-bit seed
_LOW = 0xFFFFFFFF
_numbers = itertools.count(1)


def current_pass() -> int | None:
    """The number of the pass that is running or being replayed; None outside of any."""
    seed = torch.default_generator.initial_seed()
    return seed & _LOW if seed >> 32 == _TAG else None


@contextlib.contextmanager
def numbered_pass(number: int) -> Iterator[None]:
    """Mark everything inside as pass `number` (below 2**32); sampling is not disturbed."""
    outer = torch.default_generator.initial_seed()
    _write_seed(_TAG << 32 | number)
    try:
        yield
    finally:
        _write_seed(outer)


def is_replaying() -> bool:
    """Whether we are inside a backward pass, where only checkpointing runs forward code."""
    return torch._C._current_graph_task_id() != -1


def next_number() -> int:
    """A pass number that no other pass of this process has; the global RNG is left alone."""
    return next(_numbers) & _LOW


def draw_number() -> int:
    """A pass number from the global RNG, so that a replay of the whole model draws the same one."""
    return int(torch.randint(0, _LOW, ()))


def _write_seed(seed: int) -> None:
    state = torch.default_generator.get_state()
    state[:8].view(torch.int64).fill_(seed - (seed >> 63 << 64))  # the same bits as a signed number
    torch.default_generator.set_state(state)
