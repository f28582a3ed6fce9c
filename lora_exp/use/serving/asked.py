"""What is asked of the thread that owns the model, and what it tells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lora_exp.errors import UserError
from lora_exp.use.serving.text import Writer


class RefusedRequestError(UserError):
    """A request that is not answered: ``status`` as of HTTP, ``code`` as OpenAI's clients know it."""

    def __init__(self, message: str, status: int = 400, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0: always the likeliest token. ``top_p``: among the likeliest that have this share together."""

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None


@dataclass(frozen=True)
class Written:
    """A token that was written: its ``logprob`` (nats) and those of the likeliest, where they were asked for."""

    token: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """What was written since the last one. ``finish``: why it is the last, stop or length; None before."""

    text: str
    written: tuple[Written, ...] = ()
    finish: str | None = None


@dataclass(frozen=True)
class Failed:
    """Why there will be no more."""

    error: Exception


Event = Piece | Failed


@dataclass(eq=False)
class Asked:
    """One prompt to go on with. ``adapter``: the model's own name for it. ``ends``: the tokens that end an answer.

    ``logprobs``: of how many of the likeliest tokens; None: of none, not even of what was written. ``tell`` is called
    in the model's thread. ``is_cancelled``: nobody waits for it any more; any thread may say so.
    """

    prompt: list[int]
    adapter: str
    most: int
    writer: Writer
    tell: Callable[[Event], None]
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    logprobs: int | None = None
    is_cancelled: bool = False


def closing() -> RefusedRequestError:
    return RefusedRequestError("the server is shutting down: ask another one, or start it again", 503, "shutting_down")


def gone() -> RefusedRequestError:
    return RefusedRequestError("the adapter was unloaded while the request waited", 404, "model_not_found", "model")
