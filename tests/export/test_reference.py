"""The one comparison, against torch's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from lora_exp.errors import UserError
from lora_exp.export.format import Tolerance
from lora_exp.export.reference import Figures, compare, read, reference_of, save, shortened

TOKENS = torch.arange(6).view(2, 3)


@pytest.fixture
def logits() -> torch.Tensor:
    torch.manual_seed(0)
    return 4 * torch.randn(2, 3, 1000)


def kl(p: torch.Tensor, q: torch.Tensor) -> float:
    return float(F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean())


def test_figures_are_torchs(logits: torch.Tensor) -> None:
    others = logits + 0.3 * torch.randn_like(logits)
    found = compare(reference_of(TOKENS, logits), others)
    assert found.max_logit == pytest.approx(float((logits - others).abs().max()), rel=1e-6)
    assert found.mean_kl == pytest.approx(kl(logits, others), rel=1e-4)
    following = others[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    assert found.loss == pytest.approx(float(F.cross_entropy(*following)), rel=1e-6)
    exact = compare(reference_of(TOKENS, logits), logits)
    assert (exact.max_logit, exact.mean_kl) == (0, pytest.approx(0, abs=1e-7))
    assert exact.loss == exact.trained_loss == found.trained_loss
    assert compare(shortened(reference_of(TOKENS, logits)), others).loss is None


def test_log_probabilities_are_compared_where_no_more_is_known(logits: torch.Tensor) -> None:
    others = logits + 0.3 * torch.randn_like(logits)
    found = compare(reference_of(TOKENS, logits), others.log_softmax(-1), log_probabilities=True)
    assert found.max_logit == pytest.approx(
        float((logits.log_softmax(-1) - others.log_softmax(-1)).abs().max()), rel=1e-4
    )
    assert found.mean_kl == pytest.approx(kl(logits, others), rel=1e-4)
    shifted = compare(reference_of(TOKENS, logits), logits.log_softmax(-1))
    assert shifted.max_logit > 1  # as logits they are others


def test_a_runtime_may_tell_the_likeliest_alone(logits: torch.Tensor) -> None:
    """The KL is then of the likeliest and of all others as one entry, so that it is no larger."""
    others = logits + 0.3 * torch.randn_like(logits)
    q = others.log_softmax(-1)
    least = q.topk(200, -1).values[..., -1:]
    told = q.masked_fill(q < least, torch.nan)
    found, whole = (compare(reference_of(TOKENS, logits), each, log_probabilities=True) for each in (told, q))
    p = logits.log_softmax(-1)
    known = ~told.isnan()
    rest = [torch.where(known, each.exp(), 0).sum(-1).neg().add(1) for each in (p, q)]
    expected = torch.where(known, p.exp() * (p - q), 0).sum(-1) + rest[0] * (rest[0] / rest[1]).log()
    assert found.mean_kl == pytest.approx(float(expected.mean()), rel=1e-3)
    assert 0.5 * whole.mean_kl < found.mean_kl <= whole.mean_kl
    assert found.max_logit <= whole.max_logit
    ours = p.masked_fill(p < p.topk(200, -1).values[..., -1:], torch.nan)
    exact = compare(reference_of(TOKENS, logits), ours, log_probabilities=True)
    assert (exact.max_logit, exact.mean_kl) == (pytest.approx(0, abs=1e-5), pytest.approx(0, abs=1e-7))


def test_what_is_not_told_is_at_most_the_least_that_is(logits: torch.Tensor) -> None:
    """Answers of another model cannot hide behind entries that are not told."""
    p, q = logits.log_softmax(-1), (-logits).log_softmax(-1)
    told = q.masked_fill(q < q.topk(50, -1).values[..., -1:], torch.nan)
    for reference in (reference_of(TOKENS, logits), reference_of(TOKENS, logits, 50)):
        assert compare(reference, told, log_probabilities=True).max_logit > 1
    nothing = torch.full_like(p, torch.nan)
    assert compare(reference_of(TOKENS, logits), nothing, log_probabilities=True).max_logit == float("inf")


def test_the_small_copy_holds_nearly_all_and_never_more(logits: torch.Tensor, tmp_path: Path) -> None:
    others = logits + 0.3 * torch.randn_like(logits)
    save(shortened(reference_of(TOKENS, logits), 256), tmp_path / "file.safetensors")
    small = read(tmp_path / "file.safetensors")
    assert small.values.shape == (2, 3, 256)
    assert float(small.rest.exp().max()) < 0.02
    found, whole = compare(small, others), compare(reference_of(TOKENS, logits), others)
    assert found.mean_kl <= whole.mean_kl + 1e-6
    assert found.mean_kl == pytest.approx(whole.mean_kl, rel=0.05)
    assert 0.5 * whole.max_logit < found.max_logit <= whole.max_logit
    assert compare(small, logits).mean_kl == pytest.approx(0, abs=1e-6)


def test_a_classifiers_few_entries_are_all_kept() -> None:
    logits = torch.randn(4, 3)
    small = shortened(reference_of(torch.zeros(4, 7, dtype=torch.long), logits))
    assert small.values.shape == (4, 3)
    assert compare(small, logits + torch.tensor([0.5, 0, 0])).max_logit == pytest.approx(0.5)


def test_answers_of_another_shape_are_no_answers(logits: torch.Tensor) -> None:
    for wrong in (logits[:1], logits[..., :500], logits[:, :2]):
        with pytest.raises(UserError, match="it is not that model"):
            compare(reference_of(TOKENS, logits), wrong)


def test_what_is_not_a_number_is_never_within(logits: torch.Tensor) -> None:
    broken = logits.clone()
    broken[0, 0, 0] = torch.nan
    found = compare(reference_of(TOKENS, logits), broken)
    assert not found.within(Tolerance(1e9, 1e9))
    assert Figures(1.0, 0.1).within(Tolerance(1.0, 0.1))
    assert not Figures(1.1, 0.1).within(Tolerance(1.0, 0.1))
    assert not Figures(1.0, 0.2).within(Tolerance(1.0, 0.1))
