"""What the processes of one training do together: sum, tell each other, stop at the same step.

One process is a ``World`` of one, whose sums are what it is given.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lora_exp.errors import UserError
from lora_exp.machine import launch, signals
from lora_exp.machine.launch import Launch

_BUCKET = 1 << 23  # values of a gradient that travel together
_T = TypeVar("_T")


@dataclass(frozen=True)
class World:
    """The processes of one training. ``rank`` counts them from 0, which leads."""

    rank: int = 0
    size: int = 1
    launched: Launch | None = None

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """The device of this process for ``device=wanted``: each has a GPU of its own. Raises UserError without one."""
        if self.launched is None or wanted == "cpu":
            return wanted
        if wanted not in ("auto", "cuda"):
            raise UserError(f"device={wanted} is for one process, and these are {self.size}: use auto, cuda or cpu")
        if torch.backends.mps.is_available():
            raise UserError(f"{self.size} processes compute on CPUs or CUDA's GPUs: use device=cpu")
        if not torch.cuda.is_available():
            return wanted
        if self.launched.local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {self.rank} finds no GPU of its own, as there are {torch.cuda.device_count()}: start as many "
                "processes (--nproc_per_node), or use device=cpu"
            )
        return f"cuda:{self.launched.local_rank}"

    def turns(self, what: str) -> contextlib.AbstractContextManager[None]:
        """A block that downloads, converts or measures: one process of a machine does, and the others find it done."""
        return contextlib.nullcontext() if self.launched is None else self.launched.first_one_then_others(what)

    def tell(self, what: str, value: str | None) -> None:
        """Let the others know what this one, which leads, has found."""
        if self.launched is not None:
            self.launched.say(what, value)

    def told(self, what: str) -> str | None:
        """What the leading process has found, waited for."""
        assert self.launched is not None
        return self.launched.said(what)

    @contextlib.contextmanager
    def in_step(self) -> Iterator[None]:
        """A block whose steps are all processes' together: a signal ends it at the next ``obey``."""
        with signals.held() if self.size > 1 else contextlib.nullcontext():
            yield

    # Each step

    def own(self, micro_batches: int) -> range:
        """Which of an optimizer step's micro batches are this process's: every so-manieth."""
        return range(self.rank, micro_batches, self.size)

    def most(self, micro_batches: int) -> int:
        """How many of them a process has at most."""
        return -(-micro_batches // self.size)

    def obey(self) -> None:
        """End here, between two steps, in all processes if a signal has come to one of them."""
        if self.size == 1:
            signals.obey()
        elif number := int(_from_all(torch.tensor([signals.received() or 0]), self.size).max()):
            raise signals.Stopped(number)

    def totals(self, numbers: Sequence[int]) -> list[int]:
        """The numbers, added up over all processes."""
        if self.size == 1:
            return list(numbers)
        summed: list[int] = _from_all(torch.tensor(numbers), self.size).sum(0).tolist()
        return summed

    def summed(self, values: Tensor) -> Tensor:
        """``values`` added up over all processes."""
        if self.size > 1:
            values = values.clone()
            torch.distributed.all_reduce(values)
        return values

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up gradients over all processes, once an optimizer step; one that a process has not counts as zeros.

        A gradient that no process has stays away, so that an optimizer leaves such a parameter alone as ever.
        """
        if self.size == 1:
            return
        listed = [parameter for parameter in parameters if parameter.requires_grad]
        having = torch.tensor([parameter.grad is not None for parameter in listed], dtype=torch.int32)
        torch.distributed.all_reduce(having)
        present = [parameter for parameter, count in zip(listed, having.tolist(), strict=True) if count]
        for parameter in present:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets([parameter.grad for parameter in present if parameter.grad is not None]):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            torch.distributed.all_reduce(flat)
            for gradient, values in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
                gradient.copy_(values.view_as(gradient))

    @torch.no_grad()
    def lead_values(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give every process the leader's values: what two machines compute may differ in the last bits."""
        for parameter in parameters if self.size > 1 else ():
            values = parameter.detach().contiguous()
            torch.distributed.broadcast(values, 0)
            parameter.copy_(values)

    def collected(self, own: bytes) -> list[bytes]:
        """What each process has, in their order."""
        return [own] if self.size == 1 else _gathered_bytes(own, self.size)

    # An evaluation

    def share(self, things: Sequence[_T]) -> Iterator[tuple[_T, bool]]:
        """This process's part of ``things``, each with whether it counts.

        Every process gets equally many, as a sharded model's passes are all processes' together: where they do not
        come out even, some get the last one again, which does not count.
        """
        for start in range(0, len(things), self.size):
            index = start + self.rank
            yield things[min(index, len(things) - 1)], index < len(things)

    def gathered(self, own: Sequence[Any]) -> list[Any]:
        """All processes' shares of an evaluation (plain values, as JSON has them), in the order of ``share``."""
        if self.size == 1:
            return list(own)
        every = [json.loads(text) for text in self.collected(json.dumps(own).encode())]
        rounds = max(map(len, every))
        return [each[i] for i in range(rounds) for each in every if i < len(each)]


ALONE = World()


@contextlib.contextmanager
def joined(device: str) -> Iterator[World]:
    """The processes of one job, connected for a block and with one fate; a world of one without a launcher."""
    launched = launch.current()
    if launched is None:
        yield ALONE
        return
    with launch.one_fate():
        world = World(launched.rank, launched.size, launched)
        try:
            _connect(launched, world.device(device))
            yield world
        finally:
            with contextlib.suppress(Exception):  # others may have gone, and this one goes
                torch.distributed.destroy_process_group()


def _connect(launched: Launch, device: str) -> None:
    from torch._C._distributed_c10d import PrefixStore

    launched.meet()
    backend = "gloo"
    if device.startswith("cuda:"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    store = PrefixStore(f"{launched.jobs}/group", launched.store)
    torch.distributed.init_process_group(backend, store=store, rank=launched.rank, world_size=launched.size)


def _buckets(gradients: list[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype and device each, in order, up to a size."""
    bucket: list[Tensor] = []
    for gradient in gradients:
        fits = not bucket or sum(each.numel() for each in bucket) + gradient.numel() <= _BUCKET
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (gradient.dtype, gradient.device)
        if not (fits and alike):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket


def _gathered_bytes(own: bytes, size: int) -> list[bytes]:
    lengths = _from_all(torch.tensor([len(own)]), size).flatten().tolist()
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    return [bytes(row[:length].tolist()) for row, length in zip(_from_all(padded, size), lengths, strict=True)]


def _from_all(own: Tensor, size: int) -> Tensor:
    """(size, n) what each process has of shape (n,)"""
    every = [torch.empty_like(own) for _ in range(size)]
    torch.distributed.all_gather(every, own)
    return torch.stack(every)
