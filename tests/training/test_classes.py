"""A classifier's losses and metrics, against scikit-learn and torch."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from lora_exp.errors import UserError
from lora_exp.training.classes import class_losses
from lora_exp.training.metrics import RowLosses, Sums, chosen

FIGURES = chosen("loss", "accuracy", "macro_f1")


def evaluated(logits: torch.Tensor, labels: torch.Tensor, size: int) -> dict[str, float]:
    sums = Sums()
    for some, theirs in zip(logits.split(size), labels.split(size), strict=True):
        sums = sums.plus(class_losses(some, theirs))
    return {name: metric(sums) for name, metric in FIGURES.items()}


@pytest.mark.parametrize("classes", [2, 5, 40])
@pytest.mark.parametrize("bias", [0.0, 3.0, 20.0])  # 20: one class is predicted alone
@pytest.mark.parametrize("size", [1, 7, 64])
def test_metrics_are_scikit_learns(classes: int, bias: float, size: int) -> None:
    oracle = pytest.importorskip("sklearn.metrics")
    draw = torch.Generator().manual_seed(classes)
    logits = torch.randn(50, classes, generator=draw)
    logits[:, 0] += bias
    labels = torch.randint(classes, (50,), generator=draw)
    found, predicted = evaluated(logits, labels, size), logits.argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = oracle.f1_score(labels, predicted, average="macro", zero_division=0)
        loss = oracle.log_loss(labels, logits.double().softmax(1), labels=range(classes))
    assert found["accuracy"] == pytest.approx(oracle.accuracy_score(labels, predicted), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1, abs=1e-12)
    assert found["loss"] == pytest.approx(loss, abs=1e-5)


def test_a_class_that_is_nowhere_does_not_count() -> None:
    logits = torch.tensor([[5.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
    assert evaluated(logits, torch.tensor([0, 1]), 2)["macro_f1"] == 1.0


def test_of_no_rows_there_is_no_score() -> None:
    assert all(math.isnan(metric(Sums())) for metric in FIGURES.values())


def test_half_precision_is_summed_up_in_float32() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(8) % 5
    expected = torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")
    torch.testing.assert_close(class_losses(logits, labels).total, expected)


def test_other_data_has_no_macro_f1() -> None:
    sums = Sums().plus(RowLosses(torch.ones(2), torch.ones(2, dtype=torch.long), {"hits": torch.ones(2)}))
    with pytest.raises(UserError, match=r"class_hits.*it counts hits"):
        FIGURES["macro_f1"](sums)
