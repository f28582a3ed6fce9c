"""What a processor multiplies fastest: 16-bit numbers as they are or in float32, and float32 by which library.

Flags do not tell: bfloat16 products took 1.4 times float32's time on one x86 without AMX and less than half of it on
another, with the same instructions. So it is measured (`measure`), when it is first asked or by whoever calls
`use_answers`; the same answers give the same numbers in every run. `LORA_EXP_BF16=native` (`float32`, `float32_few`)
and `LORA_EXP_FLOAT32=blas` (or `onednn`) answer for a whole process.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lora_exp.errors import UserError

NATIVE, FLOAT32 = "native", "float32"  # 16-bit products as they are / in float32 inside, of many rows
FLOAT32_FEW = "float32_few"  # in float32 inside, of few rows, too
BLAS, ONEDNN = "blas", "onednn"  # who multiplies float32
CHOICES = {"bf16": (NATIVE, FLOAT32, FLOAT32_FEW), "float32": (BLAS, ONEDNN)}

_SHAPES = ((512, 576, 1536), (512, 1536, 1536))  # M rows, K inputs, N outputs of a layer's product
_ROUNDS = 5
_SECONDS = 0.4  # no further round after so many
_CLEARLY = 1.04  # oneDNN must be so many times as fast as torch's own choice to be taken
_FAR = 3.0  # float32 so many times as fast: no instructions for 16-bit products, and converting W gains at few rows


Product = tuple[torch.dtype, Callable[[Tensor, Tensor], Tensor]]


@dataclasses.dataclass(frozen=True)
class Rates:
    """FLOP/s of products at layer-like shapes, the best of a few rounds; 0 where there is no such product."""

    blas: float
    onednn: float
    bfloat16: float

    @property
    def float32(self) -> float:
        """Of float32, by whom `answers` takes for it."""
        return self.onednn if self._is_by_onednn else self.blas

    def answers(self) -> Answers:
        slow = FLOAT32_FEW if self.float32 > _FAR * self.bfloat16 else FLOAT32
        return Answers(NATIVE if self.bfloat16 >= self.float32 else slow, ONEDNN if self._is_by_onednn else BLAS)

    @property
    def _is_by_onednn(self) -> bool:
        return self.onednn > _CLEARLY * self.blas


@dataclasses.dataclass(frozen=True)
class Answers:
    """`bf16`: how 16-bit products are made on a CPU; `float32`: by whom float32's are."""

    bf16: str
    float32: str


_told: Answers | None = None
_found: dict[int, Answers] = {}  # by number of threads
_measuring = threading.Lock()


def answers() -> Answers:
    """What holds now: told, from the environment, or measured at the first question (a third of a second)."""
    if _told is not None:
        return _told
    threads = torch.get_num_threads()
    if (known := _found.get(threads)) is None:
        with _measuring:
            known = _found.get(threads) or _found.setdefault(threads, with_environment(lambda: measure().answers()))
    return known


def use_answers(told: Answers | None) -> None:
    """From now on, in this process; None: as measured."""
    global _told
    _told = told


@contextlib.contextmanager
def answered(bf16: str = FLOAT32, float32: str = BLAS) -> Iterator[None]:
    """Inside, these are the answers, whatever the machine."""
    outer = _told
    use_answers(Answers(bf16, float32))
    try:
        yield
    finally:
        use_answers(outer)


def with_environment(found: Callable[[], Answers]) -> Answers:
    """LORA_EXP_BF16 and LORA_EXP_FLOAT32 where they are set, and `found()` for what they leave open.

    Raises UserError for a value that is no answer.
    """
    given = {}
    for key, choices in CHOICES.items():
        value = os.environ.get(f"LORA_EXP_{key.upper()}", "auto")
        if value not in (*choices, "auto"):
            raise UserError(f"LORA_EXP_{key.upper()}={value} is no answer: use {', '.join(choices)} or auto")
        if value != "auto":
            given[key] = value
    return Answers(**given) if len(given) == len(CHOICES) else dataclasses.replace(found(), **given)


@torch.no_grad()
def measure(device: torch.device | str = "cpu") -> Rates:
    """Multiply for about a third of a second and see. The global random numbers are left alone."""
    device = torch.device(device)
    products: dict[str, Product] = {
        "blas": (torch.float32, lambda x, w: torch.mm(x, w.T)),
        "bfloat16": (torch.bfloat16, lambda x, w: torch.mm(x, w.T)),
    }
    if device.type == "cpu" and has_onednn():
        products["onednn"] = torch.float32, onednn_product
    shapes = _SHAPES if device.type == "cpu" else ((4096, 4096, 4096),)
    logs = dict.fromkeys(("blas", "onednn", "bfloat16"), -math.inf)
    with torch.autocast(device.type, enabled=False):
        for name, rates in _raced(products, shapes, device).items():
            logs[name] = sum(map(math.log, rates)) / len(rates)
    return Rates(**{name: math.exp(value) for name, value in logs.items()})


def has_onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ (M, N) for x (M, K) and W (N, K), in any layout."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


def onednn_sum(total: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """total (M, K) + G W for G (M, N) and W (N, K), as a new tensor."""
    added: Tensor = torch.ops.mkldnn._linear_pointwise.binary(grad, total, weight.T, None, "add")
    return added


def _raced(
    products: Mapping[str, Product], shapes: Sequence[tuple[int, int, int]], device: torch.device
) -> dict[str, list[float]]:
    """The best FLOP/s of each product at each shape; rounds take turns, so that a disturbance hits all of them."""
    best: dict[str, list[float]] = {name: [] for name in products}
    until = time.perf_counter()
    for M, K, N in shapes:
        until += _SECONDS / len(shapes)
        inputs = {dtype: (_values(M, K, dtype, device), _values(N, K, dtype, device)) for dtype, _ in products.values()}
        calls = {name: functools.partial(product, *inputs[dtype]) for name, (dtype, product) in products.items()}
        for call in calls.values():
            _seconds(call, device)  # the first call prepares what later ones find ready
        seconds = dict.fromkeys(products, math.inf)
        for turn in range(_ROUNDS):
            if turn and time.perf_counter() > until:
                break
            seconds = {name: min(seconds[name], _seconds(call, device)) for name, call in calls.items()}
        for name in products:
            best[name].append(2 * M * K * N / seconds[name])
    return best


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _values(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers between -0.5 and 0.5, not drawn."""
    return torch.arange(rows * columns, device=device).remainder(1021).div(1021).sub(0.5).view(rows, columns).to(dtype)
