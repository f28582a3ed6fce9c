"""Jobs in processes that may die: what became of each, whatever became of the others."""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus


def failed(overrides: Sequence[str], error: Exception) -> JobReturn:
    """Of a job whose process gave nothing back: a sweeper that looks at it meets ``error``."""
    found = JobReturn(overrides=list(overrides), status=JobStatus.FAILED)
    found.return_value = error
    return found
