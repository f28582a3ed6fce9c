"""The pages: what is asked becomes prompts for the engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from lora_exp.use.serving import shapes
from lora_exp.use.serving.answers import Serving, Wish, respond
from lora_exp.use.serving.asked import RefusedRequestError
from lora_exp.use.serving.errors import about, say_errors
from lora_exp.use.serving.figures import figures
from lora_exp.use.serving.shapes import ChatShape, CompletionShape, Json
from lora_exp.use.serving.wire import Chat, Completion, LoadAdapter, UnloadAdapter

log = logging.getLogger(__name__)
_FIRST_WORDS = 16  # of a completion that does not say how long it may be, as OpenAI has it


def make_app(serving: Serving) -> FastAPI:
    app = FastAPI(title="lora_exp", docs_url=None, redoc_url=None, openapi_url=None)
    say_errors(app)
    _add_answers(app, serving)
    _add_adapters(app, serving)
    _add_figures(app, serving)
    return app


def _add_answers(app: FastAPI, serving: Serving) -> None:
    @app.post("/v1/completions")
    async def complete(body: Completion, request: Request) -> Response:
        served = serving.adapters.named(body.model)
        prompts = served.prompts
        with about("prompt"):
            tokens = [prompts.of_text(p) if isinstance(p, str) else prompts.of_tokens(p) for p in body.prompts]
        if not tokens or len(tokens) > serving.batch:
            raise RefusedRequestError(
                f"prompt holds {len(tokens)} prompts: send 1 to {serving.batch} (serve.batch) at once", param="prompt"
            )
        shape = CompletionShape(served, body.logprobs is not None)
        wish = Wish(served, tokens, body.max_tokens, _FIRST_WORDS, body.logprobs, prompts.ends)
        return await respond(serving, body, wish, shape, request)

    @app.post("/v1/chat/completions")
    async def chat(body: Chat, request: Request) -> Response:
        served = serving.adapters.named(body.model)
        with about("messages"):
            tokens = served.prompts.of_messages([message.plain for message in body.messages])
            ends = served.prompts.chat_ends
        most = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        wish = Wish(served, [tokens], most, serving.most, logprobs, ends)
        return await respond(serving, body, wish, ChatShape(served, body.logprobs), request)


def _add_adapters(app: FastAPI, serving: Serving) -> None:
    adapters = serving.adapters

    @app.get("/v1/models")
    async def models() -> Json:
        return {"object": "list", "data": [shapes.model_card(each, adapters.base) for each in adapters.all()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Json:
        return shapes.model_card(adapters.named(name), adapters.base)

    @app.post("/v1/load_lora_adapter")
    async def load(body: LoadAdapter) -> Response:
        await _in_model_thread(serving, lambda: adapters.load(body.lora_name, body.lora_path))
        log.info(f"serve  {body.lora_name} is loaded")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @app.post("/v1/unload_lora_adapter")
    async def unload(body: UnloadAdapter) -> Response:
        await _in_model_thread(serving, lambda: adapters.unload(body.lora_name))
        log.info(f"serve  {body.lora_name} is unloaded")
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def _add_figures(app: FastAPI, serving: Serving) -> None:
    @app.get("/health")
    async def health() -> Response:
        state = {"status": "ok" if serving.engine.is_alive else "closing", "adapters": len(serving.adapters)}
        state |= {"running": serving.engine.running, "waiting": serving.engine.waiting}
        return JSONResponse(state, 200 if serving.engine.is_alive else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return PlainTextResponse(figures(serving.engine, len(serving.adapters)))


async def _in_model_thread(serving: Serving, work: Callable[[], None]) -> None:
    await asyncio.shield(asyncio.wrap_future(serving.engine.between_steps(work)))
