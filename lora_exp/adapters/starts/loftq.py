"""LoftQ (arXiv 2310.08659), one iteration: AB begins as what quantisation took from W, as far as r directions hold it.

The base stays as it was quantised. The paper's further iterations quantise W - AB instead, which is another base; for
one that stays, the first iteration is the best there is in Frobenius norm (Eckart-Young). What counts is the error of
the layer's output, where its inputs are of very different sizes: with `rows`, each column of the error counts as much
as its input does over that many rows of data (QERA, arXiv 2410.06040, the approximate solution).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lora_exp.adapters.host import Host
from lora_exp.adapters.numerics.packed_weights import is_quantised
from lora_exp.adapters.numerics.singular import ITERATIONS, check_iterations, principal_factors
from lora_exp.adapters.starts.registry import start
from lora_exp.adapters.starts.start import Blank, FactoredStart
from lora_exp.errors import UserError

_LEAST = 1e-4  # of the mean


@start("loftq")
class LoftqStart(FactoredStart):
    """`iterations` of the randomised decomposition; None is the exact one. `rows` of data to weigh the error by; 0:
    none. A layer that is not quantised has lost nothing, and begins as by default."""

    def __init__(self, *, iterations: int | None = ITERATIONS, rows: int = 0) -> None:
        self.iterations = check_iterations(iterations)
        if isinstance(rows, bool) or not isinstance(rows, int) or rows < 0:
            raise UserError(f"start_options: rows={rows!r} must be a whole number of rows, or 0 for none")
        self.rows = rows

    def check(self, hosts: Mapping[str, Host], ranks: Mapping[str, int]) -> None:
        super().check(hosts, ranks)
        if not any(host.weight.is_meta or is_quantised(host.weight) for host in hosts.values()):
            raise UserError(
                "start='loftq' makes up for what quantisation took, and no adapted layer is quantised; load the base "
                "in 4 or 8 bits, or use another start"
            )

    def fill(self, blank: Blank) -> None:
        if not is_quantised(blank.host.weight):
            blank.host.initialise(blank.lora_A, blank.lora_B)
            return
        W, A, B = blank.matrices()
        lost = (blank.asked("dense_weights", W.shape).to(W) - W) / blank.scale
        counts = _counts(blank, W) if self.rows else W.new_ones(W.shape[1])
        found = principal_factors(lost * counts, len(B), self.iterations)
        A.copy_(found[0] / counts[:, None])
        B.copy_(found[1])


def _counts(blank: Blank, W: Tensor) -> Tensor:
    """(K,) how much each column of W counts; one whose input is nearly never there still a little."""
    scales = blank.asked("input_scales", W.shape[1:]).to(W)
    return scales.clamp_min(scales.mean() * _LEAST)
