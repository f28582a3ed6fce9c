"""Whether a server answers at all, asked before a library spends minutes on retries to find out."""

from __future__ import annotations

import functools
import socket
import urllib.request
from urllib.parse import urlsplit

_TIMEOUT_S = 5


def refusal(url: str) -> OSError | None:
    """Why no connection to the http(s) address can be had; None where it can, or where a proxy hides it."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme not in ("http", "https") or _has_proxy(parts.scheme, host):
        return None
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=_TIMEOUT_S).close()
    except OSError as error:
        return error
    return None


@functools.cache
def hub_answers() -> bool:
    """Whether the model hub (``HF_ENDPOINT``) can be reached; asked once a process."""
    from huggingface_hub import constants

    return refusal(constants.ENDPOINT) is None


def _has_proxy(scheme: str, host: str) -> bool:
    return scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(host)
