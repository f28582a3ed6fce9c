"""The thread that owns the model: who waits, who is refused, and that nobody gets another's text."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lora_exp.machine.place import Place
from lora_exp.use.serving.asked import Asked, Event, Failed, Piece, RefusedRequestError, Sampling, gone
from lora_exp.use.serving.engine import Engine
from lora_exp.use.serving.text import Writer

FAILS = 60  # a token that the model fails at


class Counting(torch.nn.Module):
    """Says the number after the last one, from 49 on again from 0; waits at ``gate``. A stand-in without weights."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()

    def forward(self, input_ids: torch.Tensor, attention_mask: Any, past_key_values: Any, use_cache: bool) -> Any:
        self.gate.wait(30)
        if (input_ids == FAILS).any():
            raise RuntimeError("unlucky")
        states = input_ids[:, None, :, None].float()
        past_key_values.update(states, states, 0)
        following = torch.where(input_ids < 50, (input_ids + 1) % 50, input_ids + 1)
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, FAILS + 1).float())


@pytest.fixture
def model() -> Counting:
    return Counting()


@pytest.fixture
def engine(model: Counting) -> Iterator[Engine]:
    engine = Engine(SimpleNamespace(model=model, place=Place(torch.device("cpu"), torch.float32)), 2, 2)  # type: ignore[arg-type]
    for name in ("a", "b"):
        engine.admit(name)
    engine.start()
    yield engine
    model.gate.set()
    engine.close(0)
    assert engine.join(10)


def asked(prompt: list[int], adapter: str = "a", most: int = 4) -> tuple[Asked, queue.Queue[Event]]:
    heard: queue.Queue[Event] = queue.Queue()
    writer = Writer(lambda tokens: "".join(f"{token}," for token in tokens))
    return Asked(prompt, adapter, most, writer, heard.put, Sampling(0.0)), heard


def text(heard: queue.Queue[Event]) -> str:
    found = ""
    while True:
        event = heard.get(timeout=20)
        if isinstance(event, Failed):
            raise event.error
        assert isinstance(event, Piece)
        found += event.text
        if event.finish:
            return found


def test_what_waits_longer_than_there_is_room_for_is_answered_in_turn(engine: Engine, model: Counting) -> None:
    model.gate.clear()
    wishes = [asked([number], "ab"[number % 2]) for number in range(4)]
    for wish, _ in wishes:
        engine.submit([wish])
    model.gate.set()
    assert [text(heard) for _, heard in wishes] == ["1,2,3,4,", "2,3,4,5,", "3,4,5,6,", "4,5,6,7,"]
    assert engine.counts.mixed_steps > 0


def test_more_than_may_wait_are_refused_at_once(engine: Engine, model: Counting) -> None:
    model.gate.clear()
    wishes = [asked([number]) for number in range(4)]
    engine.submit([wishes[0][0]])
    for wish, _ in wishes[1:]:
        engine.submit([wish])
    with pytest.raises(RefusedRequestError, match=r"serve\.queue=2") as refused:
        engine.submit([asked([9])[0]])
    assert refused.value.status == 429
    model.gate.set()
    assert all(text(heard).count(",") == 4 for _, heard in wishes)


def test_a_dropped_adapters_requests_end_with_an_error_and_the_others_go_on(engine: Engine, model: Counting) -> None:
    model.gate.clear()
    wishes = [asked([1], "a", 40), asked([2], "b", 5), asked([3], "a", 5)]
    for wish, _ in wishes:
        engine.submit([wish])
    while engine.running < 2:
        time.sleep(0.001)
    done = engine.between_steps(lambda: engine.drop("a", gone()))
    model.gate.set()
    done.result(20)
    for place in (0, 2):
        with pytest.raises(RefusedRequestError, match="unloaded"):
            text(wishes[place][1])
    assert text(wishes[1][1]) == "3,4,5,6,7,"
    late, heard = asked([1], "a")
    engine.submit([late])
    with pytest.raises(RefusedRequestError, match="unloaded"):
        text(heard)


def test_nobody_writes_on_for_one_who_has_gone(engine: Engine, model: Counting) -> None:
    wish, heard = asked([1], most=10**6)
    engine.submit([wish])
    heard.get(timeout=20)
    wish.is_cancelled = True
    other, answered = asked([5])
    engine.submit([other])
    assert text(answered) == "6,7,8,9,"
    assert engine.counts.cancelled == 1
    engine.close(20)
    assert engine.join(20)  # as nobody is left


def test_a_step_that_fails_takes_only_its_own_requests_along(
    engine: Engine, model: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    wish, heard = asked([FAILS - 3], most=10)
    engine.submit([wish])
    with pytest.raises(RefusedRequestError, match="its log says") as failed:
        text(heard)
    assert failed.value.status == 500
    assert "unlucky" in caplog.text
    other, answered = asked([20])
    engine.submit([other])
    assert text(answered) == "21,22,23,24,"


def test_closing_refuses_what_waits_and_lets_what_runs_end(engine: Engine, model: Counting) -> None:
    model.gate.clear()
    running = [asked([1], most=6), asked([2], most=6)]
    for wish, _ in running:
        engine.submit([wish])
    waiting, heard = asked([3])
    engine.submit([waiting])
    while engine.running < 2:
        time.sleep(0.001)
    engine.close(20)
    model.gate.set()
    assert [text(each) for _, each in running] == ["2,3,4,5,6,7,", "3,4,5,6,7,8,"]
    for refused in (lambda: text(heard), lambda: engine.submit([asked([1])[0]])):
        with pytest.raises(RefusedRequestError, match="shutting down") as error:
            refused()
        assert error.value.status == 503
    assert engine.join(10)


def test_closing_cuts_off_what_takes_too_long(engine: Engine) -> None:
    wish, heard = asked([1], most=10**6)
    engine.submit([wish])
    heard.get(timeout=20)
    engine.close(0)
    assert engine.join(10)
    with pytest.raises(RefusedRequestError, match="shutting down"):
        text(heard)
