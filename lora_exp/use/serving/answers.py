"""One HTTP request's answers: asked of the engine, heard as they are written, and handed on whole or in pieces."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lora_exp.errors import UserError
from lora_exp.use.serving import shapes
from lora_exp.use.serving.adapters import Adapters, Served
from lora_exp.use.serving.asked import Asked, Event, Failed, Piece, RefusedRequestError, Sampling
from lora_exp.use.serving.engine import Engine
from lora_exp.use.serving.errors import as_json
from lora_exp.use.serving.shapes import Json, Shape
from lora_exp.use.serving.text import Writer
from lora_exp.use.serving.wire import Sampled

log = logging.getLogger(__name__)
Told = AsyncGenerator[tuple[int, Piece], None]


@dataclass(frozen=True)
class Serving:
    """What the routes need. ``context``: tokens of a prompt and its answer; ``most``: of an answer."""

    engine: Engine
    adapters: Adapters
    context: int
    most: int
    batch: int


@dataclass(frozen=True)
class Wish:
    """``unsaid``: how many tokens an answer has at most, where the request does not say."""

    served: Served
    prompts: list[list[int]]
    most: int | None
    unsaid: int
    logprobs: int | None
    ends: frozenset[int]

    def length(self, prompt: list[int], serving: Serving) -> int:
        """How many tokens the answer may have. Raises RefusedRequestError for more than there is room for."""
        room = serving.context - len(prompt)
        if self.most is not None and self.most > serving.most:
            raise RefusedRequestError(
                f"max_tokens={self.most} is more than serve.max_tokens={serving.most} lets through", param="max_tokens"
            )
        if room < (self.most or 1):
            raise RefusedRequestError(
                f"the prompt has {len(prompt)} tokens, and with max_tokens={self.most or 1} that is more than the "
                f"{serving.context} of prompt and answer together (serve.context, and the model's own): send less",
                code="context_length_exceeded",
                param="messages" if self.unsaid == serving.most else "prompt",
            )
        return self.most if self.most is not None else min(self.unsaid, serving.most, room)


async def respond(serving: Serving, body: Sampled, wish: Wish, shape: Shape, request: Request) -> Response:
    """Have a request answered, whole or as a stream. Raises RefusedRequestError."""
    answers = _Answers(serving, body, wish)
    answers.ask(serving.engine)
    if not body.stream:
        pieces: list[list[Piece]] = [[] for _ in wish.prompts]
        async with aclosing(answers.told(request)) as told:
            async for choice, piece in told:
                pieces[choice].append(piece)
        if answers.is_left:
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(shape.whole(pieces, answers.counts()))
    stream = answers.told(request)
    first = await anext(stream, None)  # what is wrong from the start still gets a status that says so
    return StreamingResponse(
        _streamed(answers, first, stream, shape, body.counts_usage),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache"},
    )


async def _streamed(
    answers: _Answers, first: tuple[int, Piece] | None, told: Told, shape: Shape, counts_usage: bool
) -> AsyncIterator[bytes]:
    try:
        async with aclosing(told):
            for opening in shape.openings(len(answers.asked)):
                yield shapes.event(opening)
            if first is not None:
                yield shapes.event(shape.chunk(*first))
            async for choice, piece in told:
                yield shapes.event(shape.chunk(choice, piece))
    except Exception as error:  # the status is out already
        if not isinstance(error, UserError):
            log.exception("An answer was cut off")
        yield shapes.event(as_json(error)[1])
        return
    if counts_usage:
        yield shapes.event(shape.last(answers.counts()))
    yield shapes.event("[DONE]")


class _Answers:
    """What the engine tells of the prompts of one request, as it comes; None: that the client has gone."""

    def __init__(self, serving: Serving, body: Sampled, wish: Wish) -> None:
        self._loop, self._heard = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Event | None]]()
        self._written = 0
        self.is_left = False
        self.asked = [self._asked(choice, serving, body, wish) for choice in range(len(wish.prompts))]

    def ask(self, engine: Engine) -> None:
        engine.submit(self.asked)

    def cancel(self) -> None:
        for each in self.asked:
            each.is_cancelled = True

    def counts(self) -> Json:
        return shapes.usage(sum(len(each.prompt) for each in self.asked), self._written)

    async def told(self, request: Request) -> Told:
        """Which prompt, and what was written of its answer; ends early when the client has gone."""
        left = asyncio.create_task(self._hear_leaving(request))
        running = len(self.asked)
        try:
            while running:
                choice, event = await self._heard.get()
                if event is None:
                    self.is_left = True
                    return
                if isinstance(event, Failed):
                    raise event.error
                running -= event.finish is not None
                self._written += len(event.written)
                yield choice, event
        finally:
            left.cancel()
            self.cancel()

    def _asked(self, choice: int, serving: Serving, body: Sampled, wish: Wish) -> Asked:
        prompt = wish.prompts[choice]
        return Asked(
            prompt=prompt,
            adapter=wish.served.key,
            most=wish.length(prompt, serving),
            writer=Writer(wish.served.prompts.decode, body.stops, prompt),
            tell=lambda event: self._hear(choice, event),
            sampling=Sampling(body.temperature, body.top_p, body.seed),
            ends=wish.ends,
            logprobs=wish.logprobs,
        )

    def _hear(self, choice: int, event: Event) -> None:
        """Called in the model's thread."""
        self._loop.call_soon_threadsafe(self._heard.put_nowait, (choice, event))

    async def _hear_leaving(self, request: Request) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self._heard.put_nowait((0, None))
