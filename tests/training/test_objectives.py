"""Losses row by row, and metrics as functions of their sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from lora_exp.config import data_kinds
from lora_exp.data.images import image_losses
from lora_exp.errors import UserError
from lora_exp.training.metrics import Sums, accuracy, chosen, mean_loss, metrics, perplexity


class Fixed(nn.Module):
    """Says class 0 of any image, nine to one."""

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.tensor([0.9, 0.1]).log().expand(len(pixels), 2)


def test_image_losses_and_hits_a_row() -> None:
    rows = image_losses(Fixed(), {"pixels": torch.zeros(3, 3, 4, 4), "labels": torch.tensor([0, 1, 0])})
    torch.testing.assert_close(rows.total, -torch.tensor([0.9, 0.1, 0.9]).log())
    assert (rows.counted["hits"].tolist(), rows.count.tolist()) == ([1, 0, 1], [1, 1, 1])
    sums = Sums().plus(rows).plus(rows)
    assert accuracy(sums) == pytest.approx(2 / 3)
    assert mean_loss(sums) == pytest.approx(rows.total.mean().item())


def test_perplexity_of_a_hopeless_model_is_still_a_number() -> None:
    assert perplexity(Sums(loss=1e6, count=2)) < math.inf
    assert perplexity(Sums(loss=2 * math.log(8), count=2)) == pytest.approx(8)


@pytest.mark.parametrize("kind", data_kinds.names())
def test_every_kind_of_data_has_a_loss_and_metrics_that_there_are(kind: str) -> None:
    assert next(iter(chosen(*data_kinds[kind].metrics))) == "loss"


@pytest.mark.parametrize("name", metrics.names())
def test_figures_of_no_prediction_are_no_numbers_that_could_win(name: str) -> None:
    assert math.isnan(metrics[name](Sums()))


def test_a_metric_of_what_is_not_counted_says_so() -> None:
    with pytest.raises(UserError, match="needs 'hits', which this kind of data does not count"):
        accuracy(Sums(loss=1.0, count=2))
