"""What is refused before a request is read: foreign pages, foreign names, bodies that are too large.

There is no login, so that whoever can reach the port may ask. On a loopback address a web page of somebody else is kept
out: by its Origin, and, where it has its own name point at this machine (DNS rebinding), by its Host.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from lora_exp.use.serving.shapes import error

_Scope = MutableMapping[str, Any]
_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_LET_PASS = 2**26  # bytes
_App = Callable[[_Scope, _Receive, _Send], Awaitable[None]]


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, whatever a name server says."""
    name = host.strip("[]").rstrip(".").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


class Guards:
    """Around ``app``: bodies have up to ``most_bytes``; ``is_local``: asked from this machine alone."""

    def __init__(self, app: _App, most_bytes: int, is_local: bool) -> None:
        self._app, self._most, self._is_local = app, most_bytes, is_local

    async def __call__(self, scope: _Scope, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope["method"], headers)
        body = await _body(receive, 0 if refused else self._most)
        if refused or body is None:
            await _answer(send, *(refused or self._too_large()))
            return
        await self._app(scope, _replayed(body, receive), send)

    def _refusal(self, method: str, headers: dict[str, str]) -> tuple[int, str] | None:
        if self._is_local and not is_loopback(_host(f"//{headers.get('host', '')}")):
            return 403, "this server answers to localhost and 127.0.0.1 alone: ask it by one of these names"
        origin = headers.get("origin")
        if self._is_local and origin is not None and not is_loopback(_host(origin)):
            return 403, "a page from elsewhere may not ask this server"
        if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            return 415, "send JSON, with the header Content-Type: application/json"
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._most:
            return self._too_large()
        return None

    def _too_large(self) -> tuple[int, str]:
        return 413, f"the body is larger than serve.max_body_kb={self._most // 1024} lets through"


async def _body(receive: _Receive, most: int) -> bytes | None:
    """All of it; None if it is too large: it is let pass then, as a client that still sends hears no answer."""
    body, passed = b"", 0
    while True:
        message = await receive()
        part = message.get("body", b"")
        passed += len(part)
        body = body + part if passed <= most else b""
        if message["type"] != "http.request" or not message.get("more_body", False):
            return body if passed <= most else None
        if passed > _LET_PASS:
            return None


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _replayed(body: bytes, receive: _Receive) -> _Receive:
    """What was read already, and then what follows: that the client is gone."""
    pending: list[_Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> _Message:
        return pending.pop() if pending else await receive()

    return again


async def _answer(send: _Send, status: int, message: str) -> None:
    """And close the connection, as there may be a body that nobody reads."""
    content = json.dumps(error(message, status)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*headers, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": content})
