"""Answers as OpenAI's clients read them."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from lora_exp.use.serving.adapters import Served
from lora_exp.use.serving.asked import Piece, Written

Json = dict[str, Any]


def model_card(served: Served, base: Served) -> Json:
    return {
        "id": served.name,
        "object": "model",
        "created": served.created,
        "owned_by": "lora_exp",
        "root": served.root,
        "parent": None if served is base else base.name,
    }


def error(message: str, status: int, code: str | None = None, param: str | None = None) -> Json:
    kinds = {404: "not_found_error", 413: "invalid_request_error", 429: "rate_limit_error", 403: "permission_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def event(content: Json | str) -> bytes:
    """A server-sent one."""
    text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
    return f"data: {text}\n\n".encode()


def usage(prompt_tokens: int, written_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": written_tokens,
        "total_tokens": prompt_tokens + written_tokens,
    }


class Shape(Protocol):
    """One kind of answer, whole or in pieces. ``choice`` counts the prompts of a request."""

    def openings(self, choices: int) -> list[Json]:
        """What a stream begins with."""

    def chunk(self, choice: int, piece: Piece) -> Json: ...

    def last(self, counts: Json) -> Json:
        """The piece that has the counts alone."""

    def whole(self, pieces: Sequence[Sequence[Piece]], counts: Json) -> Json: ...


@dataclass(frozen=True)
class _Named:
    served: Served
    asks_logprobs: bool
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def _about(self, prefix: str, kind: str) -> Json:
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.served.name}


class CompletionShape(_Named):
    def openings(self, choices: int) -> list[Json]:
        return []

    def chunk(self, choice: int, piece: Piece) -> Json:
        return {**self._head(), "choices": [self._choice(choice, [piece])]}

    def last(self, counts: Json) -> Json:
        return {**self._head(), "choices": [], "usage": counts}

    def whole(self, pieces: Sequence[Sequence[Piece]], counts: Json) -> Json:
        choices = [self._choice(choice, each) for choice, each in enumerate(pieces)]
        return {**self._head(), "choices": choices, "usage": counts}

    def _head(self) -> Json:
        return self._about("cmpl", "text_completion")

    def _choice(self, choice: int, pieces: Sequence[Piece]) -> Json:
        return {
            "index": choice,
            "text": "".join(piece.text for piece in pieces),
            "logprobs": self._logprobs([each for piece in pieces for each in piece.written]),
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, written: Sequence[Written]) -> Json | None:
        if not self.asks_logprobs:
            return None
        shown = self.served.prompts.shown
        return {
            "tokens": [shown(each.token) for each in written],
            "token_logprobs": [each.logprob for each in written],
            "top_logprobs": [{shown(token): value for token, value in each.likeliest} for each in written],
        }


class ChatShape(_Named):
    def openings(self, choices: int) -> list[Json]:
        delta = {"role": "assistant", "content": ""}
        each = [{"index": choice, "delta": delta, "finish_reason": None} for choice in range(choices)]
        return [{**self._head(".chunk"), "choices": [choice]} for choice in each]

    def chunk(self, choice: int, piece: Piece) -> Json:
        delta = {"content": piece.text} if piece.text or not piece.finish else {}
        found = {"index": choice, "delta": delta, "logprobs": self._logprobs([piece]), "finish_reason": piece.finish}
        return {**self._head(".chunk"), "choices": [found]}

    def last(self, counts: Json) -> Json:
        return {**self._head(".chunk"), "choices": [], "usage": counts}

    def whole(self, pieces: Sequence[Sequence[Piece]], counts: Json) -> Json:
        choices = [self._choice(choice, each) for choice, each in enumerate(pieces)]
        return {**self._head(), "choices": choices, "usage": counts}

    def _head(self, part: str = "") -> Json:
        return self._about("chatcmpl", f"chat.completion{part}")

    def _choice(self, choice: int, pieces: Sequence[Piece]) -> Json:
        text = "".join(piece.text for piece in pieces)
        return {
            "index": choice,
            "message": {"role": "assistant", "content": text},
            "logprobs": self._logprobs(pieces),
            "finish_reason": pieces[-1].finish,
        }

    def _logprobs(self, pieces: Sequence[Piece]) -> Json | None:
        if not self.asks_logprobs:
            return None
        return {"content": [self._token(each) for piece in pieces for each in piece.written]}

    def _token(self, written: Written) -> Json:
        top = [self._entry(token, value) for token, value in written.likeliest]
        return {**self._entry(written.token, written.logprob), "top_logprobs": top}

    def _entry(self, token: int, logprob: float | None) -> Json:
        text = self.served.prompts.shown(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}
