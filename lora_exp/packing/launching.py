"""How the jobs of a sweep that share a base are run: one after the other, or several at once as lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_exp.config import Config
from lora_exp.errors import UserError
from lora_exp.machine import launch
from lora_exp.packing.groups import group_of, lane_group_of, may_share_layers, together

if TYPE_CHECKING:
    import torch

    from lora_exp.packing.company import Asked
    from lora_exp.packing.turns import Take, Turn

AUTO, JOINED, TURNS, EACH, BATCHED = "auto", "joined", "turns", "each", "batched"


@dataclass(frozen=True)
class Wish:
    """``lanes``: how many jobs are open at once; None: as many as pay. ``passes``: joined, turns or auto. ``products``
    of a joined pass's factors: each lane's own, batched for all or auto."""

    lanes: int | None
    passes: str
    products: str = AUTO

    @classmethod
    def of(cls, lanes: object, passes: object, products: object = AUTO) -> Wish:
        """Raises UserError for what is neither."""
        if lanes != AUTO and (isinstance(lanes, bool) or not isinstance(lanes, int) or lanes < 1):
            raise UserError(f"hydra.launcher.lanes={lanes} is no number of lanes: use auto, or 1 and more")
        if passes not in (AUTO, JOINED, TURNS):
            raise UserError(f"hydra.launcher.passes={passes} is not known: use {AUTO}, {JOINED} or {TURNS}")
        if products not in (AUTO, EACH, BATCHED):
            raise UserError(f"hydra.launcher.products={products} is not known: use {AUTO}, {EACH} or {BATCHED}")
        return cls(lanes if isinstance(lanes, int) else None, str(passes), str(products))

    def is_batched(self, kind: str) -> bool:
        """Whether lanes on devices of this kind go through their factors by batched products. A CPU is slower
        by it, and only with products of its own does a lane keep its bits whoever leaves."""
        return kind != "cpu" if self.products == AUTO else self.products == BATCHED


def groups_of(configs: Sequence[Config | None]) -> list[list[int]]:
    """The places of jobs: each list shares a base, lists that share more of it follow each other.

    None stands for a config that is wrong, whose job says so.
    """
    shared = together([None if config is None else group_of(config) for config in configs])
    found = []
    for places in shared:
        lanes = together([_lane_group(configs[place]) for place in places])
        found += [[places[index] for index in each] for each in lanes]
    return found


def most_lanes(configs: Sequence[Config | None], wish: Wish) -> int:
    """How many of these jobs, of one group, may be open at once; 1: they follow each other."""
    first, count = configs[0], len(configs)
    if first is None or _lane_group(first) is None or count == 1 or wish.lanes == 1 or launch.current() is not None:
        return 1
    if wish.lanes is not None:
        return min(wish.lanes, count)
    if wish.passes == TURNS:  # open at once they would only take memory
        return 1
    import torch

    from lora_exp.machine.place import Place, resolve_device
    from lora_exp.packing.measuring import MOST, most_by_memory, most_by_tokens

    try:
        device = resolve_device(first.device)
    except UserError:  # the job says so
        return 1
    is_free = wish.passes == JOINED or may_share_layers(configs)
    bound = min(count, MOST if is_free else most_by_tokens(first, device.type))
    largest = max((config for config in configs if config is not None), key=lambda config: config.rank)
    return bound if bound < 2 else most_by_memory(largest, bound, Place(device, torch.float32))


def run_lanes(
    jobs: Sequence[tuple[str, Callable[[], Any]]],
    most: int,
    wish: Wish,
    also: Sequence[Take] = (),
    same_rows: bool = False,
) -> list[Turn[Any]]:
    """Run jobs, by name, as lanes. What each ended with is in its turn. Raises ``Stopped`` when a signal has come.

    ``same_rows``: whether they see the same ones at each step.
    """
    from lora_exp.adapters.joint import JointModel
    from lora_exp.packing import resident
    from lora_exp.packing.company import Company
    from lora_exp.packing.lanes import run_in_lanes
    from lora_exp.packing.measuring import most_by_tokens, most_that_pay
    from lora_exp.packing.stem import depth
    from lora_exp.packing.turns import Turn
    from lora_exp.progress import without_bars

    def make_joint(device: torch.device) -> JointModel:
        return JointModel(resident.another(), wish.is_batched(device.type))

    company = Company(make_joint)
    company.is_joined = wish.passes != TURNS

    def choose(asked: Asked) -> int:
        if wish.passes != AUTO:
            return most
        below, count = depth(asked.forward.model) if same_rows else 0, most
        if wish.lanes is None and not below:
            count = min(most, most_by_tokens(asked.config, asked.forward.device.type))
        paying = 1 if count == 1 else most_that_pay(asked, count, make_joint, below)
        company.is_joined = paying > 1
        return max(paying, wish.lanes or 1)

    found = [Turn(name, work, also, company.is_joined) for name, work in jobs]
    with without_bars():
        run_in_lanes(found, company, choose)
    return found


def _lane_group(config: Config | None) -> str | None:
    return None if config is None else lane_group_of(config)
