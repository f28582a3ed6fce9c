"""||W + delta|| by output feature without forming W + delta, and when it has to be computed again.

Letters: N output features, K inputs, r rank. For a row w of W (N, K) and d = scale * (AB)ᵀ, with A (K, r), B (r, N):

    ||w + d||² = ||w||² + 2 scale (w A) · b + scale² (bᵀ AᵀA) · b        (b: the row's column of B)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lora_exp.adapters.host import Host
from lora_exp.adapters.numerics.autocast import without_autocast
from lora_exp.adapters.numerics.fingerprints import Fingerprint, place
from lora_exp.adapters.numerics.packed_weights import constants

_CHUNK = 1 << 20  # elements of W that are float32 at a time
_CHUNK_OFF_CPU = 1 << 22
_CANCELLED = 0.01  # below this share of ||w||² + ||d||² a sum of float32 terms has lost too many digits


Factors = Callable[[], tuple[Tensor, Tensor]]


class NormCache:
    """The norms of one adapter in one host, computed again whenever a value that they follow from may have changed.

    On a CPU all values are looked at, which takes 1 % of a training pass and tells for certain: a checkpoint's replay
    or a further micro batch computes nothing. A GPU's host would have to wait for that answer. There a norm lasts for
    one training pass (see `routing`), inside which no optimizer steps; outside of any it is not kept.
    A copy of an adapter starts with an empty cache.
    """

    def __init__(self) -> None:
        self._base: tuple[Fingerprint, Tensor] | None = None  # of W, (N,) ||w||²
        self._norm: tuple[Fingerprint, float, Tensor] | None = None  # of the factors, scale, (N,)
        self._of_pass: tuple[object, object, Tensor] | None = None  # the pass, scale and places of what was read, (N,)

    def __reduce__(self) -> tuple[type[NormCache], tuple[()]]:
        return NormCache, ()

    def norm(self, host: Host, kept: list[Tensor], factors: Factors, scale: float) -> Tensor:
        """(N,) in the factors' dtype, to be met in training even if it was found in inference mode.

        `factors()` is A and B, which follow from the values of `kept`.
        """
        ask = self._checked if _answers_at_once(kept[0]) else self._of_this_pass
        return ask(host, kept, factors, scale)

    def _checked(self, host: Host, kept: list[Tensor], factors: Factors, scale: float) -> Tensor:
        base = _base_values(host)
        known = self._base if self._base is not None and self._base[0].holds(base) else None
        found = None if known is None else self._norm
        if found is not None and found[1] == scale and found[0].holds(kept):
            return found[2]
        with _for_training(kept[0]):
            W, flat_A, flat_B = _matrices(host, *factors())
            if known is None:
                known = self._base = Fingerprint(base), squared_rows(W, flat_A.dtype)
            norm = factored_norm(W, flat_A, flat_B, scale, known[1])
            self._norm = Fingerprint(kept), scale, norm
        return norm

    def _of_this_pass(self, host: Host, kept: list[Tensor], factors: Factors, scale: float) -> Tensor:
        running, known = host.route.pass_at_hand(), self._of_pass
        read = [place(t) for t in (*_base_values(host), *kept)]
        if running is not None and known is not None and known[0] is running and known[1] == (scale, read):
            return known[2]
        with _for_training(kept[0]):
            norm = dense_norm(*_matrices(host, *factors()), scale)
        self._of_pass = running, (scale, read), norm
        return norm


@contextmanager
def _for_training(A: Tensor) -> Iterator[None]:
    """A constant in full precision, no tensor of inference mode: that one may not be met in training."""
    with torch.inference_mode(False), torch.no_grad(), without_autocast(A.device.type):
        yield


def _answers_at_once(tensor: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return tensor.device.type == "cpu"


def _base_values(host: Host) -> list[Tensor]:
    weight = host.kept.get("weight", host.weight)
    return [weight, *constants(host, weight)]


def _matrices(host: Host, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    matrices = host.matrices(A, B)
    assert matrices is not None
    return matrices


def squared_rows(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, K) -> (N,) ||w||², squared in `dtype` and added up in float64."""
    return torch.cat([rows.square().sum(1, dtype=torch.float64) for rows in _chunks(weight, dtype)])


def factored_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float, squared: Tensor) -> Tensor:
    """(N,) ||w + scale * (AB)ᵀ|| for W (N, K), A (K, r), B (r, N), squared (N,); never zero."""
    Bt, wide = B.T, squared.dtype
    cross = torch.cat([rows @ A for rows in _chunks(weight, A.dtype)])  # (N, r)
    ours = (Bt @ (A.T @ A) * Bt).sum(1, dtype=wide) * scale**2
    total = squared + ours + (cross * Bt).sum(1, dtype=wide) * (2 * scale)
    cancelled = (total <= _CANCELLED * (squared + ours)).nonzero().flatten()
    if len(cancelled):
        rows = weight[cancelled].to(A.dtype) + scale * (Bt[cancelled] @ A.T)
        total[cancelled] = rows.square().sum(1, dtype=wide)
    return total.clamp_min_(0).sqrt_().to(A.dtype).clamp_min_(torch.finfo(A.dtype).tiny)


def dense_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """`factored_norm` with some rows of W + delta at a time: no branch that waits for values, nothing to keep."""
    step = max(1, _CHUNK_OFF_CPU // weight.shape[1])
    norms = []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].to(A.dtype)
        changed = torch.addmm(rows, B[:, start : start + step].T, A.T, alpha=scale)
        norms.append(torch.linalg.vector_norm(changed, dim=1))
    return torch.cat(norms).clamp_min_(torch.finfo(A.dtype).tiny)


def _chunks(weight: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of W in `dtype`, a few at a time if they have to be converted."""
    step = len(weight) if weight.dtype == dtype else max(1, _CHUNK // weight.shape[1])
    return (rows.to(dtype) for rows in weight.split(step))
