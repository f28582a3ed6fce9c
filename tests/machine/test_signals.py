"""What a signal does, by where it comes and how often."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
from collections.abc import Callable, Iterator

import pytest

from lora_exp.machine import signals
from lora_exp.machine.signals import Stopped


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Send this process signals, each a wish of its own."""
    clock = [0.0]
    monkeypatch.setattr("lora_exp.machine.signals.time.monotonic", lambda: clock[0])

    def send(number: int = signal.SIGINT, after_s: float = 1.0) -> None:
        clock[0] += after_s
        os.kill(os.getpid(), number)

    # Whoever started the tests may have had them ignored (nohup, a shell's background), and what is ignored stays so.
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
    before = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        with signals.noted():
            yield send
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_between_steps_the_first_waits_for_the_next_step(number: int, code: int, ask: Callable[..., None]) -> None:
    with signals.between_steps():
        signals.obey()
        ask(number)
        with pytest.raises(Stopped) as stopped:
            signals.obey()
    assert stopped.value.code == code
    assert str(stopped.value) == signal.Signals(number).name


@pytest.mark.parametrize(
    ("place", "noted"), [(signals.at_once, 0), (signals.between_steps, 1), (signals.while_closing, 2)]
)
def test_how_many_are_only_noted(
    place: Callable[[], contextlib.AbstractContextManager[None]], noted: int, ask: Callable[..., None]
) -> None:
    came = 0

    def keep_asking() -> None:
        nonlocal came
        with place():
            while came < 5:
                came += 1
                ask()

    with pytest.raises(Stopped):
        keep_asking()
    assert came == noted + 1


def test_the_first_one_gives_the_code(ask: Callable[..., None]) -> None:
    ask(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped:
        ask(signal.SIGINT)
    assert stopped.value.code == 143


def test_one_wish_that_comes_twice_is_one(ask: Callable[..., None]) -> None:
    """A terminal and a shell, or ``timeout``, send one and the same wish on."""
    with signals.between_steps():
        ask()
        ask(after_s=0.01)
        ask(signal.SIGHUP, after_s=0.01)
    assert signals.received() == signal.SIGINT


def test_what_a_finaliser_or_a_library_swallows_is_obeyed_later(
    ask: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    class Litter:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            ask()

    def collect() -> None:
        with signals.at_once():
            Litter()
            gc.collect()  # where Python ignores what is raised

    with pytest.raises(Stopped):
        collect()
    assert capsys.readouterr().err == ""


def test_a_phase_that_swallows_what_is_raised_ends_all_the_same(ask: Callable[..., None]) -> None:
    def swallow() -> None:
        with signals.at_once(), contextlib.suppress(BaseException):
            ask()

    with pytest.raises(Stopped):
        swallow()


def test_what_a_library_made_of_it_is_known() -> None:
    made = ImportError("broken")
    made.__cause__ = RuntimeError("on the way")
    made.__cause__.__context__ = Stopped(signal.SIGTERM)
    found = signals.stop_behind(made)
    assert found is not None
    assert found.code == 143
    assert signals.stop_behind(ValueError("another")) is None


def test_a_signal_to_one_job_of_a_worker_is_not_the_next_ones() -> None:
    with signals.noted(), signals.between_steps():
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received() == signal.SIGTERM
    with signals.noted(), signals.at_once():
        assert signals.received() is None
