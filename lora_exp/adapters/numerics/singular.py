"""The largest singular directions of a matrix, as a product of two factors."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_exp.errors import UserError

ITERATIONS = 16  # PiSSA's choice (arXiv 2404.02948, table 3), for spectra that fall slowly
_MORE = 8  # directions looked for beside those wanted, which make the wanted ones precise


def principal_factors(matrix: Tensor, rank: int, iterations: int | None) -> tuple[Tensor, Tensor]:
    """A (K, r) and B (r, out) for a matrix (out, K): (AB)ᵀ is its best approximation of that rank.

    The singular values are shared out evenly. With `iterations` the decomposition is a randomised one (arXiv
    0909.4061), which starts at directions drawn from the global RNG of the matrix's device; None: the exact one.
    """
    if iterations is None:
        U, S, Vt = torch.linalg.svd(matrix, full_matrices=False)
        V = Vt.T
    else:
        U, S, V = torch.svd_lowrank(matrix, min(rank + _MORE, *matrix.shape), niter=iterations)
    root = S[:rank].sqrt()
    return V[:, :rank] * root, root[:, None] * U[:, :rank].T


def check_iterations(iterations: int | None) -> int | None:
    if iterations is None or (isinstance(iterations, int) and not isinstance(iterations, bool) and iterations >= 0):
        return iterations
    raise UserError(f"start_options: iterations={iterations!r} must be a whole number such as 16, or None for all")
