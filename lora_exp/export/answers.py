"""What a model answers, whatever its kind.

Letters: N texts, T tokens a text, V entries of the vocabulary (or classes).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn


@torch.no_grad()
def logits_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """(N, T, V), or (N, V) of a classifier, in float32, for ``tokens`` (N, T), or for images (N, C, S, S)."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):  # none of transformers'
        found = model(tokens)
    elif tokens.is_floating_point():
        found = model(pixel_values=tokens)
    elif getattr(config, "is_encoder_decoder", False):
        found = model(input_ids=tokens, decoder_input_ids=tokens)
    else:
        found = model(input_ids=tokens)
    logits: Tensor = found if isinstance(found, Tensor) else found.logits
    return logits.float()


def plain_model(folder: Path, device: torch.device, **options: Any) -> nn.Module:
    """A folder in hub layout by plain transformers: the class that its config names, computing in float32."""
    import transformers

    facts = transformers.AutoConfig.from_pretrained(folder)
    (name,) = facts.architectures
    given: dict[str, Any] = {"dtype": torch.float32, **options}
    if hasattr(facts, "quantization_config"):
        given = {"device_map": {"": device}}
    model = getattr(transformers, name).from_pretrained(folder, **given)
    return cast(nn.Module, model if "device_map" in given else model.to(device)).eval()
