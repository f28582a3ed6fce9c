"""PiSSA (arXiv 2404.02948): A and B begin as W's principal singular directions, which are what is trained.

Their product is taken off again, where the paper takes it off W.
"""

from __future__ import annotations

from lora_exp.adapters.numerics.singular import ITERATIONS, check_iterations, principal_factors
from lora_exp.adapters.starts.registry import start
from lora_exp.adapters.starts.start import Blank, FactoredStart


@start("pissa")
class PissaStart(FactoredStart):
    """`iterations` of the randomised decomposition ("fast SVD" in the paper); None is the exact one."""

    is_subtracted = True

    def __init__(self, *, iterations: int | None = ITERATIONS) -> None:
        self.iterations = check_iterations(iterations)

    def fill(self, blank: Blank) -> None:
        W, A, B = blank.matrices()
        found = principal_factors(W / blank.scale, len(B), self.iterations)
        A.copy_(found[0])
        B.copy_(found[1])
