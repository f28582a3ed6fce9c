"""Tokens as text, a piece at a time: what was handed out is never taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]
_UNFINISHED = "\ufffd"  # what a character decodes to as long as bytes of it are missing
_BEFORE = 6  # tokens of the prompt: some tokenizers write a word otherwise at the beginning of a text


class Writer:
    """Holds back what may be part of a character, or the beginning of a text in ``stop``, which ends the answer."""

    def __init__(self, decode: Decode, stop: Sequence[str] = (), prompt: Sequence[int] = ()) -> None:
        self._decode, self._stop = decode, list(stop)
        self._before = list(prompt[-_BEFORE:])
        self._skipped = len(decode(self._before)) if self._before else 0
        self._tokens: list[int] = []
        self._given = 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """The text that is certain by now, beyond what was given before."""
        self._tokens.append(token)
        certain = self._text().rstrip(_UNFINISHED)
        if (place := self._first_stop(certain)) is not None:
            self.is_stopped = True
            return self._given_up_to(certain, place)
        return self._given_up_to(certain, len(certain) - self._begun_stop(certain))

    def rest(self) -> str:
        """What was held back, where no more comes."""
        text = self._text()
        return "" if self.is_stopped else self._given_up_to(text, len(text))

    def _text(self) -> str:
        return self._decode([*self._before, *self._tokens])[self._skipped :]

    def _given_up_to(self, text: str, place: int) -> str:
        piece = text[self._given : place]
        self._given = max(self._given, place)
        return piece

    def _first_stop(self, text: str) -> int | None:
        return min((place for stop in self._stop if (place := text.find(stop)) >= 0), default=None)

    def _begun_stop(self, text: str) -> int:
        """How many characters at the end begin a text that stops."""
        lengths = (length for stop in self._stop for length in range(1, len(stop)) if text.endswith(stop[:length]))
        return max(lengths, default=0)
