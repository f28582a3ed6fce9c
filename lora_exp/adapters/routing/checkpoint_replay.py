"""What torch tells about a checkpointed part of a model, while it runs first and while it is replayed.

torch.utils.checkpoint runs a block a second time during backward, possibly after other forward passes, another
route or another active adapter, and on a GPU in a thread of autograd's own. A replay can be told in two ways:

    not reentrant   its frame is in the closure of the hook through which the block saves its tensors
    reentrant       backward is at the checkpoint's node, which was made right before the block ran

Nothing is written to the global random generator: other threads may be sampling from it.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable

import torch

Hook = Callable[..., object]

_get_hooks = torch._C._autograd._top_saved_tensors_default_hooks
_pop = torch._C._autograd._pop_saved_tensors_default_hooks
_push = torch._C._autograd._push_saved_tensors_default_hooks

graph_task: Callable[[], int] = torch._C._current_graph_task_id  # the backward pass that we are inside of; -1: none
moment: Callable[[], int] = torch._C._autograd._get_sequence_nr
"""The number that the next node of this thread's graph will have."""


def saves_plainly() -> bool:
    """Whether no hook packs saved tensors here, so that no checkpoint (but a reentrant one) is at work."""
    return _get_hooks(False) is None


def top_hook() -> Hook | None:
    """What packs saved tensors here; another object for each checkpointed block and each of its replays."""
    hooks = _get_hooks(False)
    return None if hooks is None else hooks[0]


def node_number() -> int | None:
    """The moment at which the node that backward is at was made, in the thread that made it; None if it is not a
    Function written in Python: only those run a model's code again."""
    node = torch._C._current_autograd_node()
    return node._sequence_nr() if isinstance(node, torch.autograd.function.BackwardCFunction) else None


def is_at_checkpoint() -> bool:
    """Whether backward is at the node of a reentrant checkpoint."""
    node = torch._C._current_autograd_node()
    return type(node).__name__ == "CheckpointFunctionBackward"


def checkpoint_frames() -> tuple[list[object], object, Hook | None]:
    """Frames of the blocks that run for the first time here, innermost first, up to a block that is replayed;
    its frame; and the hook of that replay (both None if there is none)."""
    fresh: list[object] = []
    below = []
    found: tuple[object, Hook | None] = None, None
    try:
        while (hooks := _get_hooks(True)) is not None:
            _pop()
            below.append(hooks)
            frame, is_replay = _frame_of(hooks[0])
            if is_replay:
                found = frame, hooks[0]
                break
            if frame is not None:
                fresh.append(frame)
    finally:
        for hooks in reversed(below):
            _push(*hooks)
    return fresh, *found


def is_checkpoints(hook: Hook) -> bool:
    return getattr(hook, "__module__", None) == "torch.utils.checkpoint"


def _frame_of(hook: Hook) -> tuple[object, bool]:
    """(the checkpoint frame that a packing hook serves, is it a replay), or (None, False)."""
    for cell in getattr(inspect.unwrap(hook), "__closure__", None) or ():
        value = cell.cell_contents
        is_replay = isinstance(value, weakref.ref)
        frame = value() if isinstance(value, weakref.ref) else value
        if type(frame).__name__ == "_CheckpointFrame":
            return frame, is_replay
    return None, False
