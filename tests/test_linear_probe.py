"""The probe that an adapter must beat, against scikit-learn's logistic regression."""

from __future__ import annotations

import pytest
import torch

from benchmarks.linear_probe import probe


@pytest.mark.parametrize("strength", [1e-3, 1e-1])
def test_the_probe_is_scikit_learns(strength: float) -> None:
    linear = pytest.importorskip("sklearn.linear_model")
    draw = torch.Generator().manual_seed(0)
    inputs, labels = torch.randn(120, 6, generator=draw), torch.randint(3, (120,), generator=draw)
    inputs[:, :3] += torch.nn.functional.one_hot(labels, 3)
    head = probe(inputs, labels, strength)
    oracle = linear.LogisticRegression(C=1 / (strength * len(labels)), tol=1e-8, max_iter=1000).fit(inputs, labels)
    found = head(inputs).softmax(1).detach()
    torch.testing.assert_close(found, torch.tensor(oracle.predict_proba(inputs)).float(), atol=1e-3, rtol=0)
