"""Whether a model keeps the conversations of one row apart: asked of the model itself, before it is trained.

Most do, by the positions alone (``packing``). Some cannot: their state runs on through a row (Mamba), they take no
positions (BLOOM), or an attention of their own ignores them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lora_exp.data.chat.packing import pack, row_of
from lora_exp.errors import UserError, is_bug

_FIRST, _SECOND = 5, 6  # tokens
_LEAK = 0.05  # of what the tokens before would change if they were seen: more than rounding, less than any sight


def check_keeps_apart(model: nn.Module, device: torch.device) -> None:
    """Raise UserError if one conversation of a row changes what is predicted in the next, or its place in the row does.

    Two small forward passes.
    """
    one, other, second = _samples(model)
    packed = _batch([pack([one, second], _FIRST + _SECOND), pack([other, second], _FIRST + _SECOND),
                     pack([second, one], _FIRST + _SECOND)])  # fmt: skip
    seen = {"input_ids": packed["input_ids"][:2]}
    apart, joined = (_logits(model, batch, device) for batch in ({k: packed[k] for k in packed if k != "labels"}, seen))
    could = (joined[0, _FIRST:] - joined[1, _FIRST:]).abs().max()
    by_others = (apart[0, _FIRST:] - apart[1, _FIRST:]).abs().max()
    by_place = (apart[0, _FIRST:] - apart[2, :_SECOND]).abs().max()
    if max(by_others, by_place) > _LEAK * could:
        what = "what stands before a conversation" if by_others >= by_place else "a conversation's place in the row"
        raise _refusal(f"{what} changes what {type(model).__name__} predicts in it")


def _samples(model: nn.Module) -> list[dict[str, Tensor]]:
    """Three texts of tokens that no two share."""
    config = getattr(model, "config", None)
    find = getattr(config, "get_text_config", lambda: config)
    size = int(getattr(find(), "vocab_size", 64))
    ids = [3 + (index * 7919) % max(1, size - 3) for index in range(2 * _FIRST + _SECOND)]
    return [row_of(ids[:_FIRST]), row_of(ids[_FIRST : 2 * _FIRST]), row_of(ids[2 * _FIRST :])]


def _batch(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@torch.no_grad()
def _logits(model: nn.Module, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    was_training = model.training
    model.eval()
    try:
        found: Tensor = model(**{name: values.to(device) for name, values in batch.items()}).logits
    except TypeError as error:
        if "position_ids" not in str(error) or is_bug(error):
            raise
        raise _refusal(f"{type(model).__name__} takes no positions") from None
    finally:
        model.train(was_training)
    return found.float()


def _refusal(reason: str) -> UserError:
    return UserError(
        f"data.packing=true would let conversations of a row mix: {reason}. Use data.packing=false, "
        "or model.attention=sdpa or eager where another one is chosen"
    )
