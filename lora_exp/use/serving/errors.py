"""What is refused or fails, as OpenAI's clients read it, with the reason."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from lora_exp.errors import UserError
from lora_exp.use.serving import shapes
from lora_exp.use.serving.asked import RefusedRequestError
from lora_exp.use.serving.shapes import Json


def say_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return _refused(RefusedRequestError(_said(error.errors()), param=_param(error.errors())))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        said = {404: "there is no such page: ask /v1/completions, /v1/chat/completions or /v1/models"}
        message = said.get(error.status_code, str(error.detail))
        return JSONResponse(shapes.error(message, error.status_code), error.status_code, headers=error.headers)

    @app.exception_handler(UserError)
    async def refused(request: Request, error: UserError) -> Response:
        return _refused(error)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:  # starlette raises it again: uvicorn logs it
        return _refused(error)


def _refused(error: Exception) -> Response:
    status, content = as_json(error)
    return JSONResponse(content, status, headers={"Retry-After": "1"} if status in (429, 503) else None)


def as_json(error: Exception) -> tuple[int, Json]:
    """The status, and the body."""
    if isinstance(error, RefusedRequestError):
        return error.status, shapes.error(str(error), error.status, error.code, error.param)
    if isinstance(error, UserError):
        return 400, shapes.error(str(error), 400)
    return 500, shapes.error("the server failed at this request: its log says at what", 500)


def _said(errors: Sequence[Any]) -> str:
    """Each field with its reason, never with the value, which may be long."""
    found = []
    for each in errors[:4]:
        if each["type"] == "json_invalid":
            return f"the body is not valid JSON ({each.get('ctx', {}).get('error', each['msg'])})"
        place = ".".join(str(part) for part in each["loc"] if part != "body")
        reason = str(each["msg"]).removeprefix("Value error, ")
        found.append(f"{place[:200]}: {reason}" if place else reason)
    return "; ".join(dict.fromkeys(found))


def _param(errors: Sequence[Any]) -> str | None:
    place = [str(part) for part in errors[0]["loc"] if part != "body"] if errors else []
    return place[0][:200] if place else None


@contextlib.contextmanager
def about(param: str) -> Iterator[None]:
    """What is refused inside is refused for this field."""
    try:
        yield
    except RefusedRequestError:
        raise
    except UserError as error:
        raise RefusedRequestError(str(error), param=param) from None
