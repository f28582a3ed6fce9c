"""The next token: by transformers' own rules, and by nobody's numbers but its own."""

from __future__ import annotations

import math

import pytest
import torch

from lora_exp.use.serving.asked import Sampling
from lora_exp.use.serving.sampling import choose, generator_of, shares


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 1.0])
def test_the_shares_are_those_of_transformers(temperature: float, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopPLogitsWarper

    logits = torch.randn(1, 50, generator=torch.Generator().manual_seed(1)) * 3
    theirs = TemperatureLogitsWarper(temperature)(None, logits)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = shares(logits[0], Sampling(temperature, top_p))
    torch.testing.assert_close(ours, theirs.softmax(-1)[0])


def drawn(count: int, seed: int | None, beside: int) -> list[int]:
    """Tokens of one sequence, written beside others that draw as well."""
    sampling, generators = Sampling(1.0, 0.95, seed), [generator_of(Sampling(seed=place)) for place in range(beside)]
    own, logits, found = generator_of(sampling), torch.linspace(0, 3, 40), []
    for _ in range(count):
        rows = torch.stack([*[logits.flip(0)] * beside, logits])
        samplings = [*[Sampling(1.3)] * beside, sampling]
        found.append(choose(rows, samplings, [*generators, own], [None] * (beside + 1))[-1].token)
    return found


def test_a_seed_gives_the_same_whoever_is_beside() -> None:
    assert drawn(20, 7, 0) == drawn(20, 7, 3)
    assert drawn(20, 7, 0) != drawn(20, 8, 0)
    assert drawn(20, None, 0) != drawn(20, None, 0)


def test_temperature_0_takes_the_likeliest_and_logprobs_are_the_models_own() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0]])
    (found,) = choose(logits, [Sampling(0.0)], [generator_of(Sampling())], [2])
    total = math.log(1 + math.exp(2) + math.exp(1))
    assert found.token == 1
    assert found.logprob == pytest.approx(2 - total)
    assert [token for token, _ in found.likeliest] == [1, 2]
    assert [value for _, value in found.likeliest] == pytest.approx([2 - total, 1 - total])
    (hot,) = choose(logits, [Sampling(2.0, seed=1)], [generator_of(Sampling(seed=1))], [0])
    assert hot.logprob == pytest.approx(float(logits[0, hot.token]) - total)
    assert hot.likeliest == ()
