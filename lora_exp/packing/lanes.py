"""Jobs as lanes: several are open at once, and wait for each other before each optimizer step."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.machine import signals
from lora_exp.packing import turns
from lora_exp.packing.company import Asked, Company, Reply
from lora_exp.packing.turns import Turn

if TYPE_CHECKING:
    from lora_exp.training.lane import Lane
    from lora_exp.training.loop import Forward, Passed, Passes
    from lora_exp.training.objectives import Batch

log = logging.getLogger(__name__)
TOKENS = 256  # of a pass, up to which more rows are faster on a CPU
Choose = Callable[[Asked], int]


def passes_of(config: Config) -> Passes | None:
    """How the job whose turn it is makes its passes: together with others; None where it is no lane."""
    turn = turns.current()
    if turn is None:
        return None

    def ask(forward: Forward, lanes: Sequence[Lane], drawn: Sequence[Sequence[Batch]]) -> Passed:
        (lane,) = lanes
        found: Passed = turn.wait_for(Asked(config, forward, lane, drawn))
        return found

    return ask


def evaluation_rows(config: Config) -> int | None:
    """How many rows a lane of common passes evaluates at once: as many as make such a pass. None: a micro batch."""
    turn, positions = turns.current(), kind_of(config.data).positions
    if turn is None or not turn.is_joined or positions is None:
        return None
    rows, most = config.train.micro_batch_size, TOKENS // positions
    return most if most >= 2 * rows else None  # no two lanes would fit into such a pass


def run_in_lanes(jobs: Sequence[Turn[Any]], company: Company, choose: Choose) -> None:
    """Run every job to its end. ``choose`` says, from the first step that is asked for, how many are open at once.

    What a job ends with stands in its turn. A signal ends those that are open and leaves the others out; that is
    raised when all is closed.
    """
    coming, live = deque(jobs), list[Turn[Any]]()
    most: int | None = None
    while coming or live:
        while coming and len(live) < (most or 1) and signals.received() is None:
            turn = coming.popleft()
            turn.go_on()
            live += [] if turn.is_over else [turn]
            if live and most is None:
                most = _chosen(choose, live[0].asked, company)
        if signals.received() is not None:
            coming.clear()
        replies = _replies(company, live)
        for turn in live:
            turn.go_on(replies[turn])
        live = [turn for turn in live if not turn.is_over]
    signals.obey()


def _chosen(choose: Choose, asked: Asked, company: Company) -> int:
    """One where it cannot be told: whoever is open must come to its end, whatever happens here."""
    try:
        return choose(asked)
    except signals.Stopped:  # the lane obeys it in its turn
        return 1
    except Exception as error:
        company.give_up(error)
        return 1


def _replies(company: Company, live: Sequence[Turn[Any]]) -> dict[Turn[Any], Reply]:
    try:
        found = company.answer({turn: turn.asked for turn in live})
    except signals.Stopped as stop:  # asked more than once, in the midst of a pass
        return dict.fromkeys(live, _raising(stop))
    except Exception as error:
        company.give_up(error)
        return {turn: turn.asked.alone for turn in live}
    return {turn: found[turn] for turn in live}


def _raising(error: BaseException) -> Reply:
    def reply() -> Passed:
        raise error

    return reply
