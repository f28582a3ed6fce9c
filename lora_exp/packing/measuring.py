"""How many lanes pay off in one pass: bounded by what is known before, then by memory, then measured."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import torch

from lora_exp.adapters import LoraModel
from lora_exp.adapters.joint import why_alone
from lora_exp.config import Config
from lora_exp.data import kind_of
from lora_exp.machine import signals
from lora_exp.machine.place import Place
from lora_exp.packing import shelf
from lora_exp.packing.company import Asked, Before, MakeJoint, joined
from lora_exp.packing.lanes import TOKENS
from lora_exp.packing.stem import Stem
from lora_exp.plan.estimate import GIB, Planner
from lora_exp.plan.precheck import memory_gib
from lora_exp.training.loop import Forward, passes

log = logging.getLogger(__name__)
MOST = 16
# Tokens of a pass, beyond which more rows were never faster a row: on two cores at 135 million weights. A GPU's is a
# guess.
_TOKENS = {"cpu": TOKENS, "cuda": 16384}
_GAIN = 0.9  # of a lane's own pass: what a share in a common one must be below
_SHARE = 0.8  # of the memory


def most_by_tokens(config: Config, device: str) -> int:
    """How many lanes of such rows are worth a try; 1: no two are."""
    positions = kind_of(config.data).positions
    if positions is None:  # images: a row alone is as much as many tokens
        return 1
    tokens = positions * config.train.micro_batch_size
    return max(1, min(MOST, _TOKENS.get(device, 0) // tokens))


def most_by_memory(config: Config, most: int, place: Place) -> int:
    """``most``, or as many such lanes as fit beside the base into memory; what cannot be planned is no bound."""
    memory = memory_gib(place.device) * GIB * _SHARE
    try:
        planner = Planner(config, place, is_told=True)
        if planner.upper_bound() * most <= memory:
            return most
        plan = planner.plan()
    except Exception as error:
        log.debug("not planned: %s", error)
        return most
    base = sum(plan.base_bytes.values())
    return max(1, min(most, int((memory - base) // max(plan.total_bytes - base, 1))))


def most_that_pay(asked: Asked, most: int, make_joint: MakeJoint, below: int = 0) -> int:
    """``most`` lanes or fewer, by the time that a lane's share in a common pass takes; nothing is trained by it.

    ``below``: how many layers they go through once.
    """
    model = asked.forward.model
    if not isinstance(model, LoraModel) or why_alone(model) is not None:
        return 1
    here, count = shelf.current(), most
    sections = asked.config.model, asked.config.quantization, asked.config.data
    key = (*sections, asked.config.train.micro_batch_size, most, below)

    def measure() -> int:
        nonlocal count
        alone_s = _timed(asked, 1, make_joint)
        while count > 1 and (common_s := _timed(asked, count, make_joint, below)) / count > _GAIN * alone_s:
            log.info(f"lanes  {count} in one pass take {common_s / count:.3f} s each, one alone {alone_s:.3f} s")
            count //= 2
        if count > 1:
            log.info(f"lanes  {count} share a pass: {common_s / count:.3f} s each, one alone takes {alone_s:.3f} s")
        return count

    return measure() if here is None else here.take("lanes", key, measure)


def _timed(asked: Asked, count: int, make_joint: MakeJoint, below: int = 0) -> float:
    """Seconds of a forward and a backward pass of so many lanes that are all like this one; the second of two.

    ``below``: how many layers they go through once.
    """
    joint = make_joint(asked.forward.device)
    model = asked.forward.model
    assert isinstance(model, LoraModel)
    lanes = [replace(asked.lane, name=f"probe_{number}") for number in range(count)]
    for lane in lanes:
        joint.borrow(lane.name, model)
    joint.train()
    forward = joined(asked.forward, joint, Stem(joint, logging.DEBUG) if below else None)
    before = Before(joint, lanes, asked.forward.device)
    found = 0.0
    for _ in range(2):
        signals.obey()
        started = _now(forward)
        passes(forward, lanes, [asked.drawn[0][:1]] * count)
        found = _now(forward) - started
        before.put_back()
    return found


def _now(forward: Forward) -> float:
    if forward.device.type == "cuda":
        torch.cuda.synchronize(forward.device)
    return time.perf_counter()
