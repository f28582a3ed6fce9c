"""The next token of each sequence, from its own numbers alone: who else is in the batch makes no difference.

Letters: B sequences, V words of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_exp.use.serving.asked import Sampling, Written


def generator_of(sampling: Sampling) -> torch.Generator:
    """One for each sequence, on the CPU; without a seed begun anew each time."""
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(
    logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator], logprobs: Sequence[int | None]
) -> list[Written]:
    """The next tokens for ``logits`` (B, V)."""
    likeliest = logits.argmax(-1).tolist()
    found = []
    for row, (sampling, generator, count) in enumerate(zip(samplings, generators, logprobs, strict=True)):
        token = likeliest[row] if sampling.temperature == 0 else _drawn(logits[row], sampling, generator)
        found.append(Written(token) if count is None else _with_logprobs(logits[row], token, count))
    return found


def shares(logits: Tensor, sampling: Sampling) -> Tensor:
    """(V,) with what probability each token is drawn, float32 on the CPU."""
    found = torch.softmax(logits.float().cpu() / sampling.temperature, -1)
    if sampling.top_p < 1:
        ordered, places = found.sort(descending=True, stable=True)
        found[places[ordered.cumsum(0) - ordered >= sampling.top_p]] = 0.0
        found /= found.sum()
    return found


def _drawn(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    return int(torch.multinomial(shares(logits, sampling), 1, generator=generator))


def _with_logprobs(logits: Tensor, token: int, count: int) -> Written:
    """By the model's own distribution, before temperature and ``top_p``."""
    found = torch.log_softmax(logits.float(), -1)
    top = found.topk(min(count, len(found)))
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Written(token, float(found[token]), pairs)
