"""How fast a training is."""

from __future__ import annotations

import time


class Clock:
    """Tokens a second of training alone: evaluation stops it."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()
        self._paused_at = 0.0

    def count(self, tokens: int) -> None:
        self._tokens += tokens

    def pause(self) -> None:
        self._paused_at = time.perf_counter()

    def resume(self) -> None:
        self._since += time.perf_counter() - self._paused_at

    def lap(self) -> float:
        now = time.perf_counter()
        rate = self._tokens / max(now - self._since, 1e-9)
        self._tokens, self._since = 0, now
        return rate
