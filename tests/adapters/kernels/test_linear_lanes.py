"""Lanes in one batched product against each lane's own, and against the plain formulas."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_exp.adapters import LoraConfig, LoraModel, use_reference
from lora_exp.adapters.kernels.linear_lanes import Lanes
from lora_exp.adapters.numerics import matmul, precision
from lora_exp.adapters.numerics.precision import BLAS, FLOAT32, NATIVE, Answers

UNLIKE: dict[str, dict[str, Any]] = {
    "a": {"rank": 2},
    "b": {"rank": 4, "lora_alpha": 3, "use_rslora": True},
    "c": {"rank": 3, "lora_dropout": 0.4},
    "d": {"rank": 3, "variant": "lora_fa", "lora_dropout": 0.2},
    "e": {"rank": 4, "variant": "lora_fb"},
    "f": {"rank": 4, "start": "olora"},
    "g": {"rank": 7, "variant": "vera"},
}


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> list[Lanes]:
    """Those that were used."""
    found: list[Lanes] = []
    add = Lanes.add
    monkeypatch.setattr(Lanes, "add", lambda self, *args: found.append(self) or add(self, *args))
    return found


def made(options: dict[str, dict[str, Any]], dtype: torch.dtype, first: nn.Module | None = None) -> LoraModel:
    torch.manual_seed(0)
    base = nn.Sequential(first or nn.Linear(6, 7), nn.Linear(7, 4, bias=False)).to(dtype)
    names = list(options)
    model = LoraModel(base, LoraConfig(target_modules="all-linear", **options[names[0]]), names[0], verbose=False)
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(target_modules="all-linear", **options[name]))
    with torch.no_grad():
        for name in names:
            for value in model.adapter_parameters(name).values():
                value.add_(0.3 * torch.randn_like(value))
    return model.train()


def passed(
    model: LoraModel, sizes: dict[str, int], needs_dx: bool = True, batched: bool = False
) -> list[Tensor | None]:
    """Output and gradients of a pass."""
    model = copy.deepcopy(model)
    model.route_state.batches_lanes = batched
    torch.manual_seed(3)
    x = torch.randn(sum(sizes.values()), 3, 6).to(model.wrapped[1].weight.dtype).requires_grad_(needs_dx)
    with model.route(sizes):
        out = model(x)
    out.float().square().sum().backward()
    return [
        out.detach(),
        x.grad,
        *(value.grad for name in model.configs for value in model.adapter_parameters(name).values()),
    ]


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("names", ["ab", "abc", "dd", "de", "abcdefg", "gb"])
def test_a_batched_product_is_each_lanes_own(names: str, needs_dx: bool, added: list[Lanes]) -> None:
    options = {f"{name}{place}": UNLIKE[name] for place, name in enumerate(names)}
    model, sizes = made(options, torch.float64), dict.fromkeys(options, 2)
    each = passed(model, sizes, needs_dx)
    assert not added
    ours = passed(model, sizes, needs_dx, batched=True)
    assert len(added) == 2
    with use_reference():
        plain = passed(model, sizes, needs_dx)
    for mine, theirs, formula in zip(ours, each, plain, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(mine, formula, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("order", ["_ab", "a_b", "ab_", "_a"])
def test_a_slice_of_the_base_alone_is_a_lane_of_zeros(order: str, added: list[Lanes]) -> None:
    model = made({name: UNLIKE[name] for name in "abc"}, torch.float64)
    sizes = {"__base__" if name == "_" else name: 2 for name in order}
    each, ours = passed(model, sizes), passed(model, sizes, batched=True)
    assert len(added) == 2
    for mine, theirs in zip(ours, each, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("wide", [True, False])
def test_16_bits_are_rounded_as_each_lanes_own(wide: bool, added: list[Lanes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_told", Answers(FLOAT32 if wide else NATIVE, BLAS))
    monkeypatch.setattr(matmul, "_FEW_ROWS", 1)
    options = {name: UNLIKE[name] for name in "abcf"}
    model, exact = made(options, torch.bfloat16), made(options, torch.float32)
    exact.load_state_dict(model.state_dict())  # values of 16 bits, in 32
    sizes = dict.fromkeys(options, 3)
    ours, truth = passed(model, sizes, batched=True), passed(exact, sizes)
    assert len(added) == 2
    for mine, true in zip(ours, truth, strict=True):
        assert mine is not None
        assert true is not None
        assert (mine.float() - true).norm() <= 0.02 * true.norm()


@pytest.mark.parametrize("kind", ["conv1d", "nf4"])
def test_other_linear_layers(kind: str, added: list[Lanes]) -> None:
    if kind == "conv1d":
        first: nn.Module = pytest.importorskip("transformers.pytorch_utils").Conv1D(7, 6)
    else:
        bitsandbytes = pytest.importorskip("bitsandbytes")
        first = bitsandbytes.nn.Linear4bit(6, 7, quant_type="nf4").to("cpu")
    options = {name: UNLIKE[name] for name in "abc"}
    model, sizes = made(options, torch.float32, first), dict.fromkeys(options, 2)
    each, ours = passed(model, sizes), passed(model, sizes, batched=True)
    assert len(added) == 2
    for mine, theirs in zip(ours, each, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("why", ["dora", "sizes", "single"])
def test_unlike_lanes_go_each_by_itself(why: str, added: list[Lanes]) -> None:
    options = {"a": {"rank": 2}, "b": {"rank": 2, "variant": "dora" if why == "dora" else "lora"}}
    model, sizes = made(options, torch.float32), {"a": 2, "b": 3 if why == "sizes" else 2}
    sizes = {"a": 2} if why == "single" else sizes
    for mine, theirs in zip(passed(model, sizes, batched=True), passed(model, sizes), strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or torch.equal(mine, theirs)
    assert not added


def test_what_is_retained_is_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes that autograd keeps of a pass, the stacks of factors not among them."""

    def kept(batched: bool) -> int:
        model, sizes = made({"a": {"rank": 4}, "b": {"rank": 4}}, torch.float32), {"a": 8, "b": 8}
        model.route_state.batches_lanes = batched
        found: dict[int, int] = {}

        def pack(value: Tensor) -> Tensor:
            found[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            return value

        with model.route(sizes), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            out = model(torch.randn(16, 3, 6))
        assert out.requires_grad
        return sum(found.values())

    assert kept(batched=True) <= kept(batched=False)


def test_gradients_of_lanes_in_float64() -> None:
    model = made({name: UNLIKE[name] for name in "abf"}, torch.float64)
    model.route_state.batches_lanes = True
    names, values = zip(*((n, v) for n, v in model.named_parameters() if v.requires_grad or "lora" in n), strict=True)
    values = tuple(value.detach().requires_grad_() for value in values)

    def run(x: Tensor, *factors: Tensor) -> Tensor:
        with model.route({"a": 1, "b": 1, "f": 1}):
            return torch.func.functional_call(model, dict(zip(names, factors, strict=True)), (x,))

    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *values))


def test_autocast(added: list[Lanes]) -> None:
    options = {name: UNLIKE[name] for name in "abc"}
    model, sizes = made(options, torch.float32), dict.fromkeys(options, 3)
    with torch.autocast("cpu", torch.bfloat16):
        each, ours = passed(model, sizes), passed(model, sizes, batched=True)
    assert len(added) == 2
    truth = passed(model, sizes)
    assert ours[0] is not None
    assert ours[0].dtype is torch.bfloat16
    for mine, theirs, true in zip(ours, each, truth, strict=True):
        assert mine is not None
        assert theirs is not None
        assert true is not None
        assert (mine.float() - true).norm() <= max(0.02 * true.norm(), 1.5 * (theirs.float() - true).norm())


def test_checkpointed_layers_draw_the_same_masks(added: list[Lanes]) -> None:
    options = {name: UNLIKE[name] for name in "bcd"}
    model, sizes = made(options, torch.float64), dict.fromkeys(options, 2)
    model.route_state.batches_lanes = True

    def run(checkpointed: bool) -> list[Tensor | None]:
        twin = copy.deepcopy(model)
        twin.route_state.batches_lanes = True
        torch.manual_seed(3)
        x = torch.randn(6, 3, 6, dtype=torch.float64, requires_grad=True)
        with twin.route(sizes):
            out = checkpoint(twin.wrapped, x, use_reentrant=False) if checkpointed else twin.wrapped(x)
            out.square().sum().backward()
        return [out, x.grad, *(p.grad for name in options for p in twin.adapter_parameters(name).values())]

    for mine, theirs in zip(run(checkpointed=True), run(checkpointed=False), strict=True):
        assert mine is not None
        assert theirs is not None
        assert torch.equal(mine, theirs)
    assert len(added) == 6
