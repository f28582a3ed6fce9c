"""Gradient checkpointing: less memory for activations, one more forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_exp.errors import UserError

if TYPE_CHECKING:  # a config is checked without torch
    from torch import nn

_OLD_NAME = "gradient_checkpointing_enable"


def checkpoint_layers(model: nn.Module, **options: object) -> None:
    """Let ``model`` keep only its layers' inputs for the backward pass, and recompute the rest there.

    Non-reentrant: the reentrant form trains nothing, silently, when no input of a layer needs a gradient, as with a
    frozen embedding (transformers#42489). ``options`` go to torch's checkpoint. Raises UserError for a model whose
    layers cannot be recomputed.
    """
    try:  # transformers 5.23 renamed it
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or getattr(model, _OLD_NAME)
        enable({"use_reentrant": False, **options})
    except (ValueError, AttributeError) as error:
        raise UserError(f"train.gradient_checkpointing=true: {error}; set it to false for this model") from error
