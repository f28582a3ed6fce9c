"""Gradient checkpointing: less memory for activations, one more forward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from lora_exp.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


def checkpoint_layers(model: nn.Module, **options: object) -> None:
    """Let ``model`` keep only its layers' inputs for the backward pass, and recompute the rest there.

    Non-reentrant: the reentrant form trains nothing, silently, when no input of a layer needs a gradient, as with a
    frozen embedding (transformers#42489). What transformers does against that, gradients for the embedding's outputs,
    would have the frozen layers below the lowest adapter recomputed and passed through for nothing. ``options`` go to
    torch's checkpoint. Raises UserError for a model whose layers cannot be recomputed.
    """
    try:  # transformers 5.23 renamed it
        newer = getattr(model, "activation_checkpointing_enable", None)
        enable = newer or cast("PreTrainedModel", model).gradient_checkpointing_enable
        enable({"use_reentrant": False, **options})
        cast("PreTrainedModel", model).disable_input_require_grads()
    except (ValueError, AttributeError) as error:
        raise UserError(f"train.gradient_checkpointing=true: {error}; set it to false for this model") from error
