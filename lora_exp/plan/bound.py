"""More than a configuration can need, in milliseconds: what spares most runs a plan before they start.

Letters: n positions of a micro batch, T a row's, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from lora_exp.config import Config
from lora_exp.data import kind_of

_WIDE = 4  # bytes: nothing is wider than float32
_TIMES = 3  # what is made around a module (residuals, activation functions, gradients) over its input and output
_SCORES = 4  # explicit attention scores, their softmax, dropout and gradient
_LOGITS = 4  # logits, their float32 copy, softmax and gradient
_WEIGHTS = 2  # the base and autocast's copies of it
_TRAINED = 8  # a trained parameter, its gradient, AdamW's two states; of some starts it too, and both joined


def upper_bound(model: nn.Module, config: Config) -> float:
    """Bytes that a step of training ``model``, a language model on any device, stays below; infinity if unknown."""
    if not isinstance(model, PreTrainedModel):
        return math.inf
    if config.adapter.is_added and not config.adapter.has_factors:  # nobody knows what a method of PEFT's adds
        return math.inf
    widths, facts, length = _widths(model), model.config.get_text_config(), kind_of(config.data).positions
    heads, depth = (getattr(facts, key, None) for key in ("num_attention_heads", "num_hidden_layers"))
    if widths is None or length is None or not isinstance(heads, int) or not isinstance(depth, int):
        return math.inf
    rows = config.train.micro_batch_size
    scores = rows * heads * length**2 * depth * _SCORES
    head = model.get_output_embeddings()
    made = rows * length * (_TIMES * sum(widths) + _LOGITS * (head.weight.shape[0] if head is not None else 0))
    count = sum(parameter.numel() for parameter in model.parameters())
    trained = config.rank * sum(widths) if config.adapter.is_added else 0
    if not config.adapter.is_added or config.bias != "none" or config.model.modules_to_save:
        trained += count
    return float(_WIDE * (_WEIGHTS * count + _TRAINED * trained + made + scores))


def _widths(model: nn.Module) -> list[int] | None:
    """Inputs plus outputs of every module with weights of its own; None where one is of no known form.

    So are convolutions and stacked experts: models with such weights keep states that are wider than all of these.
    """
    found = []
    for module in model.modules():
        shapes = [parameter.shape for parameter in module.parameters(recurse=False)]
        if any(len(shape) > 2 for shape in shapes) or sum(len(shape) == 2 for shape in shapes) > 1:
            return None
        if shapes:
            found.append(sum(_width(shape) for shape in shapes))
    return found


def _width(shape: torch.Size) -> int:
    return sum(shape) if len(shape) == 2 else 2 * shape[0] if shape else 0
