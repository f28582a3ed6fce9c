"""A process that has everything imported and forks one child a command line, with one aimed fault inside it.

Reads JSON lines: ``arguments``, ``folder`` (where it stands), ``terminal`` (where ``out`` and ``err`` go),
``environment``, and the aim: at the call number ``at`` of ``target`` (``module:name``) ``do`` happens, or after
``kill_after_s`` it is killed from outside. Answers ``pid``, then ``code``.
With ``processes`` it forks as many, which know each other as a launcher's do; the aim is at that of ``rank``, each
has its own ``out`` and ``err`` (``err.1``, …), and ``code`` is a list.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    for module in (
        "lora_exp.__main__", "lora_exp.run", "lora_exp.sweep.report", "lora_exp.models.causal_lm", "lora_exp.data.text",
        "lora_exp.backends", "lora_exp.adapters", "lora_exp.plots", "mlflow.tracking", "mlflow.store.db.utils",
        "mlflow.store.tracking.sqlalchemy_store", "transformers.models.llama.modeling_llama", "sqlalchemy",
    ):  # fmt: skip
        importlib.import_module(module)
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        if "processes" in order:
            print(json.dumps({"code": _together(order)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            os._exit(_child(order))
        print(json.dumps({"pid": pid}), flush=True)
        print(json.dumps({"code": _end(pid, order.get("kill_after_s"))}), flush=True)


def _end(pid: int, kill_after_s: float | None) -> int:
    """The child's exit code; killed from outside after so long, wherever it is then."""
    due = None if kill_after_s is None else time.monotonic() + kill_after_s
    while due is not None and time.monotonic() < due:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    if due is not None:
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _together(order: dict[str, Any]) -> list[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
    pids = []
    for rank in range(order["processes"]):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(order["processes"])}
        theirs = {**order, "environment": order["environment"] | meeting | place, "suffix": f".{rank}" if rank else ""}
        if rank != order.get("rank", 0):
            theirs.pop("target", None)
        if (pid := os.fork()) == 0:
            os._exit(_child(theirs))
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def _child(order: dict[str, Any]) -> int:
    folder = Path(order["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    os.environ.update(order.get("environment", {}))
    for number, name in ((1, "out"), (2, "err")):
        file = Path(order.get("terminal", ".")) / (name + order.get("suffix", ""))
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if "target" in order:
        _aim(order)
    sys.argv = ["lora-exp", *order["arguments"]]
    return _run()


def _run() -> int:
    from lora_exp.__main__ import main as command

    try:
        command()
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        import traceback

        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _aim(order: dict[str, Any]) -> None:
    module, _, name = order["target"].partition(":")
    *owners, last = name.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original, calls = getattr(owner, last), [0]

    def aimed(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == order.get("at", 1):
            DEEDS[order["do"]](order)
        result = original(*given, **named)
        if calls[0] == order.get("at", 1) and order.get("after"):
            DEEDS[order["after"]](order)
        return result

    setattr(owner, last, aimed)


def _signal(order: dict[str, Any]) -> None:
    os.kill(os.getpid(), order["signal"])


def _signal_later(order: dict[str, Any]) -> None:
    """From another thread, after ``delays``: one signal each."""

    def send() -> None:
        for delay in order["delays"]:
            time.sleep(delay)
            os.kill(os.getpid(), order["signal"])

    threading.Thread(target=send, daemon=True).start()


class _Litter:
    """What a collection finds, and in whose finaliser the signal comes."""

    def __init__(self, order: dict[str, Any]) -> None:
        self.itself = self
        self.order = order

    def __del__(self) -> None:
        os.kill(os.getpid(), self.order["signal"])
        sum(range(1000))


def _signal_in_finaliser(order: dict[str, Any]) -> None:
    was = gc.isenabled()
    gc.disable()
    if order.get("weak"):
        litter = _Litter({"signal": 0})
        weakref.finalize(litter, os.kill, os.getpid(), order["signal"])
    else:
        _Litter(order)
    if was:
        gc.enable()


def _kill(order: dict[str, Any]) -> None:
    del order
    os.kill(os.getpid(), signal.SIGKILL)


def _fill_disk(order: dict[str, Any]) -> None:
    del order
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _refuse(order: dict[str, Any]) -> None:
    from lora_exp.errors import UserError

    raise UserError("a value is wrong: mend it")


def _fail(order: dict[str, Any]) -> None:
    raise RuntimeError("what nobody foresaw")


def _nothing(order: dict[str, Any]) -> None:
    del order


def _raise(order: dict[str, Any]) -> None:
    raise RuntimeError(order["message"])


DEEDS: dict[str, Callable[[dict[str, Any]], None]] = {
    "signal": _signal,
    "signal later": _signal_later,
    "signal in a finaliser": _signal_in_finaliser,
    "kill": _kill,
    "full disk": _fill_disk,
    "nothing": _nothing,
    "raise": _raise,
    "refuse": _refuse,
    "fail": _fail,
}

if __name__ == "__main__":
    main()
