"""The processes that a launcher (torchrun, accelerate launch) started for one command.

Process 0 leads: it alone reads the command line, goes through a sweep, tracks and writes. The others follow: they are
told each job, with its config, in the launcher's key-value store, and say there what went wrong with them. What the
store says is what all go by, so that a job has one end, whoever met it first.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lora_exp.errors import UserError
from lora_exp.machine import signals

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_POLL_S = 0.05
_SEEN_S = 2.0
_WORD_S = 5.0  # how long a broken connection is not taken for a process's silent end: it may still say why
_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset", "Connection refused", "Broken pipe")


class OtherProcessError(UserError):
    """What another process of the run met. ``trace``: its traceback, where it was a bug."""

    def __init__(self, message: str, trace: str | None = None) -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True)
class Failure:
    """What ended a job in process ``rank``: a signal, or an error with its message and, for a bug, its traceback."""

    rank: int
    message: str
    signal: int | None = None
    trace: str | None = None


@dataclass
class Launch:
    """This process among ``size``; ``local_rank`` counts those of one machine, of which it is the ``node``-th."""

    rank: int
    size: int
    local_rank: int
    node: int
    store: Store
    jobs: int = 0  # begun so far

    @property
    def leads(self) -> bool:
        return self.rank == 0

    # Jobs

    def tell(self, job: Mapping[str, Any]) -> None:
        """Have the others do ``job``."""
        self.jobs += 1
        self.store.set(f"job/{self.jobs}", json.dumps(job))

    def next_job(self, patience_s: float = 0.0) -> dict[str, Any] | None:
        """The job that the leader tells next, waited for; None when there is none any more.

        A signal ends the waiting, after ``patience_s`` in which the leader may end first.
        """
        key, until = f"job/{self.jobs + 1}", time.monotonic() + patience_s
        while not self.store.check([key]):
            if self.store.check(["over"]):
                return None
            if time.monotonic() >= until:
                signals.obey()
            time.sleep(_POLL_S)
        self.jobs += 1
        job: dict[str, Any] = json.loads(self.store.get(key))
        return job

    def end(self, code: int) -> None:
        """Let the others go, with the exit code of all. The store may be this process's own, and end with it."""
        until = time.monotonic() + _SEEN_S
        with contextlib.suppress(Exception):  # it may be gone
            self.store.set("over", str(code))
            while time.monotonic() < until and not self.store.check([f"seen/{rank}" for rank in range(1, self.size)]):
                time.sleep(_POLL_S)

    def code(self) -> int:
        """The leader's exit code. With an error it goes first, as a launcher names whoever it saw go first."""
        code, until = int(self.store.get("over")), time.monotonic() + _WORD_S
        self.store.set(f"seen/{self.rank}", "yes")
        while code and signals.received() is None and time.monotonic() < until:
            time.sleep(_POLL_S)
        return code

    # What went wrong

    def fail(self, failure: Failure) -> Failure:
        """Say what ended the job here. Returns what counts: whatever was said first."""
        said = self.store.compare_set(self._key("failed"), "", json.dumps(asdict(failure)))
        return Failure(**json.loads(said))

    def failure(self, wait_s: float = 0.0) -> Failure | None:
        """What ended the job somewhere, if it was said within ``wait_s``."""
        until = time.monotonic() + wait_s
        while not self.store.check([self._key("failed")]):
            if time.monotonic() >= until:
                return None
            time.sleep(_POLL_S)
        return Failure(**json.loads(self.store.get(self._key("failed"))))

    # Turns

    def meet(self) -> None:
        """Wait until every process has come to the job that begins; without the deadlines of what follows."""
        self.store.set(self._key(f"here/{self.rank}"), "yes")
        for rank in range(self.size):
            self._await(self._key(f"here/{rank}"))

    @contextlib.contextmanager
    def first_one_then_others(self, what: str) -> Iterator[None]:
        """A block that one process of each machine enters first: what it downloads or converts, the others find."""
        key = self._key(f"{what}/{self.node}")
        if self.local_rank:
            self._await(key)
        yield
        if not self.local_rank:
            self.store.set(key, "done")

    def say(self, what: str, value: str | None) -> None:
        """Of the job at hand, by the leader."""
        self.store.set(self._key(what), json.dumps(value))

    def said(self, what: str) -> str | None:
        """What the leader says of it, waited for."""
        self._await(self._key(what))
        value: str | None = json.loads(self.store.get(self._key(what)))
        return value

    def _await(self, key: str) -> None:
        while not self.store.check([key]):
            signals.obey()
            if self.failure() is not None or self.store.check(["over"]):
                raise OtherProcessError("another process ended the job")  # which `one_fate` says in its own words
            time.sleep(_POLL_S)

    def _key(self, name: str) -> str:
        return f"{self.jobs}/{name}"


_launch: Launch | None = None


def is_launched() -> bool:
    """Whether the environment says that this is one of several processes."""
    return all(name in os.environ for name in _NEEDED) and int(os.environ["WORLD_SIZE"]) > 1


def follows() -> bool:
    """Whether another of them leads."""
    return is_launched() and os.environ["RANK"] != "0"


def begin() -> Launch | None:
    """Meet the other processes; None where there are none. To be called once, by the process that was launched."""
    global _launch
    if not is_launched():
        return None
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a leader that is gone is said in our words
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://"))
    local = int(os.environ.get("LOCAL_RANK", rank))
    _launch = Launch(rank, size, local, int(os.environ.get("GROUP_RANK", 0)), store)
    return _launch


def current() -> Launch | None:
    """What ``begin`` found."""
    return _launch


@contextlib.contextmanager
def one_fate() -> Iterator[None]:
    """A block of a job that ends in all processes if it ends in one: with the error, or signal, that was the first.

    A process that goes leaves the others with broken connections; those say who it was, and why.
    """
    try:
        yield
    except BaseException as error:
        if _launch is None:
            raise
        with signals.while_closing():
            _raise_what_counts(_launch, error)


def _raise_what_counts(launch: Launch, error: BaseException) -> None:
    own = _failure_of(launch, error)
    with contextlib.suppress(Exception):  # a store that is gone knows nothing better
        first = launch.failure(_WORD_S) if _is_broken(error) else None
        own = launch.fail(own) if first is None else first
    if own.rank == launch.rank or (isinstance(error, UserError) and not isinstance(error, OtherProcessError)):
        raise _silent_end(launch) if _is_broken(error) else error
    if own.signal is not None:
        raise signals.Stopped(own.signal) from None
    raise OtherProcessError(f"process {own.rank} of {launch.size}: {own.message}", own.trace) from error


def _failure_of(launch: Launch, error: BaseException) -> Failure:
    import traceback

    stop = signals.stop_behind(error)
    if stop is not None:
        return Failure(launch.rank, str(stop), stop.number)
    if isinstance(error, UserError):
        return Failure(launch.rank, str(error), trace=getattr(error, "trace", None))
    if _is_broken(error):
        return Failure(launch.rank, str(_silent_end(launch)))
    return Failure(launch.rank, f"{type(error).__name__}: {error}", trace=traceback.format_exc())


def _silent_end(launch: Launch) -> OtherProcessError:
    return OtherProcessError(
        f"Another of the {launch.size} processes ended without a word (killed, perhaps for want of memory): see what "
        "the launcher says of it, and run fewer processes or smaller batches if it was memory"
    )


def _is_broken(error: BaseException) -> bool:
    """Whether it is a collective that lost a process."""
    if not isinstance(error, RuntimeError) or isinstance(error, UserError):
        return False
    name = type(error).__name__
    return name.startswith("Dist") or any(word in str(error) for word in _BROKEN)
