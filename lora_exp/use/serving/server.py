"""``task=serve``: the base with its adapters behind a port, until a signal ends it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import uvicorn

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.machine import signals
from lora_exp.models.positions import trained_positions
from lora_exp.use.loading import Trained, load_trained
from lora_exp.use.serving.adapters import Adapters
from lora_exp.use.serving.answers import Serving
from lora_exp.use.serving.app import make_app
from lora_exp.use.serving.engine import Engine
from lora_exp.use.serving.exact import check_batches
from lora_exp.use.serving.guards import Guards, is_loopback

log = logging.getLogger(__name__)
_LOOKS_S = 0.1  # between looks for a signal
_LAST_WORDS_S = 2  # for answers that are cut off to say so


def run_serve(config: Config) -> NoReturn:
    """Serves until a signal comes, which is then obeyed. Raises UserError."""
    section = config.serve
    with _bound(section.host, section.port) as listening:
        trained = load_trained(config)
        _check_adapters_alone(trained)
        engine = Engine(trained, section.batch, section.queue)
        with signals.at_once():
            check_batches(trained, section.batch)
            adapters = Adapters(trained, engine, section.names, section.adapters, Path(section.folder or "outputs"))
        serving = Serving(engine, adapters, _context(trained), section.max_tokens, section.batch)
        _collect_garbage_again()
        if not is_loopback(section.host):
            log.warning(
                f"serve.host={section.host} is not this machine alone: whoever reaches the port may ask, load and "
                "unload, as there is no login"
            )
        app = Guards(make_app(serving), section.max_body_kb * 1024, is_loopback(section.host))
        settings = uvicorn.Config(
            app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
            proxy_headers=False, server_header=False, timeout_graceful_shutdown=section.grace_s + _LAST_WORDS_S,
        )  # fmt: skip
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        with signals.while_closing():
            asyncio.run(_serve(_Server(settings), listening, serving, section.grace_s))
    signals.obey()
    raise RuntimeError("the model's thread has ended, though nobody asked it to")


class _Server(uvicorn.Server):
    """One that leaves signals to ``machine.signals``."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(server: _Server, listening: socket.socket, serving: Serving, grace_s: int) -> None:
    serving.engine.start()
    watching = asyncio.create_task(_watch(server, listening, serving, grace_s))
    watching.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await server.serve(sockets=[listening])
    finally:
        serving.engine.close(0)
        await asyncio.to_thread(serving.engine.join, _LAST_WORDS_S)
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching


async def _watch(server: _Server, listening: socket.socket, serving: Serving, grace_s: int) -> None:
    """Say where it can be asked, and have all end when a signal comes; at once when a second one does."""
    while not server.started and not server.should_exit:
        await asyncio.sleep(_LOOKS_S / 10)
    host, port = listening.getsockname()[:2]
    names = ", ".join(each.name for each in serving.adapters.all())
    log.info(f"serve  http://{f'[{host}]' if ':' in host else host}:{port}/v1 answers as {names}; Ctrl-C ends it")
    while signals.received() is None and serving.engine.is_alive:
        await asyncio.sleep(_LOOKS_S)
    server.should_exit = True
    serving.engine.close(grace_s)
    while not signals.is_pressing():
        await asyncio.sleep(_LOOKS_S)
    serving.engine.close(0)
    server.force_exit = True
    for connection in list(server.server_state.connections):
        connection.transport.abort()


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """The port, taken before anything is loaded. Raises UserError where it cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UserError(f"serve.host={host} is not to be had ({error}): use 127.0.0.1") from error
    with listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(address)
        except (OSError, OverflowError) as error:
            raise UserError(
                f"serve.port={port} on {host} is not to be had ({error}): end what listens there, or use another "
                "(serve.port=0 takes a free one)"
            ) from error
        yield listening


def _collect_garbage_again() -> None:
    """See ``__main__``, which switches it off; never among what was made so far."""
    gc.collect()
    gc.freeze()
    gc.enable()


def _check_adapters_alone(trained: Trained) -> None:
    if trained.swapped:
        run = trained.runs[next(iter(trained.swapped))]
        raise UserError(
            f"run={run.place} trained the base's own weights: it is a model of its own, not an adapter that others can "
            "share a base with. Write it out (task=export export=merged), and give that to vLLM or llama.cpp"
        )


def _context(trained: Trained) -> int:
    """Tokens of a prompt and its answer: what the model was made for, at most ``serve.context``."""
    made_for = trained_positions(trained.model.config.to_dict())  # type: ignore[union-attr, operator]
    return min(trained.config.serve.context, made_for or trained.config.serve.context)
